"""launch/serve_reward_model.py as a process, and training runs whose reward it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import requests
import torch
from killed_runs import start, wait_for_step
from online_runs import forget_precision, run_online, save_tiny_policy
from reward_servers import StubServer, free_port, start_command, wait_until_up
from tiny_runs import ONLINE, assert_close, finished, metrics_of, plain, run, write_recipe

from drpo.config import ConfigError, load_recipe
from drpo.engine import Engine, EngineConfig
from drpo.models.tokenizer import load_tokenizer
from drpo.run.checkpoints import list_checkpoints
from drpo.run.metrics import reproducible
from drpo.trainers.online_recipe import OnlineRecipe
from launch.serve_reward_model import ensemble_of, parser
from reward_models.model import RewardModel
from reward_models.score import RewardModelScorer
from reward_models.sources import reward_from

TOKEN = "s3cret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, and a reward model of its vocabulary."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("served")
    save_tiny_policy(folder / "policy")
    tokenizer = load_tokenizer(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    RewardModel.from_causal_lm(policy, seed=0).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


def test_mistakes_are_told_in_one_line(tmp_path):
    command = plain("serve_reward_model")
    done = finished(command, str(tmp_path / "nothing"), cwd=tmp_path)
    assert done.returncode == 1 and "serve_reward_model.py: MODEL: no folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = finished(command, "rm", "--batch-size", "0", cwd=tmp_path)
    assert done.returncode == 2 and "expected a whole number above 0, got '0'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "--combine", "min"], "--combine is for several models"),
        (["a", "b", "--coef", "2"], "coef does not apply to combine=mean"),
        (["a", "b", "a"], "names a reward model twice.*'a'"),
    ],
)
def test_options_of_ensembles_that_do_not_apply_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        ensemble_of(parser().parse_intermixed_args(options))


def test_several_models_are_served_as_one(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    RewardModel.from_causal_lm(policy, seed=1).save_pretrained(tmp_path / "rm")
    load_tokenizer(folder / "policy").save_pretrained(tmp_path / "rm")
    port = free_port()
    server = start_command(folder / "rm", port, str(tmp_path / "rm"))
    try:
        info = requests.get(f"{wait_until_up(server, port)}/info", timeout=30).json()
    finally:
        server.kill()
        server.communicate()
    assert [member["name"] for member in info["members"]] == [str(folder / "rm"), str(tmp_path / "rm")]
    assert info["combine"] == "mean"


def remote(url: str, run_dir: Path, policy: Path):
    """The server as the reward of a run in this process."""
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), run_dir, 0, None)
    settings = ["reward.server.timeout_minutes=0.02", "reward.batch_size=16"]
    recipe = load_recipe(OnlineRecipe, None, [f"reward.url={url}", *settings])
    return reward_from(recipe.reward, engine, str(policy))


def test_a_server_that_is_killed_stops_the_run_which_goes_on_with_another_of_the_same_model(
    folder, tmp_path, monkeypatch
):
    """The second server has another port; one with another model is refused."""
    monkeypatch.setenv("DRPO_REWARD_TOKEN", TOKEN)
    ports = [free_port(), free_port()]
    servers = [start_command(folder / "rm", port, DRPO_REWARD_TOKEN=TOKEN) for port in ports]
    try:
        urls = [wait_until_up(server, port) for server, port in zip(servers, ports, strict=True)]
        assert requests.get(f"{urls[0]}/info", timeout=30).status_code == 401
        changes = {"num_steps": 4, "reward": {"function": None}, "checkpoint": {"every": 1}}

        def train(url: str, name: str, reward_fn=None):
            reward_fn = reward_fn or remote(url, tmp_path, folder / "policy")
            settings = changes | {"reward": {"function": None, "url": url}}
            return run_online(folder / "policy", tmp_path / name, settings, reward_fn)

        whole = train(urls[1], "whole")

        served, calls = remote(urls[0], tmp_path, folder / "policy"), []

        class Killing:
            """Kills the server before the third step's scores are asked for."""

            identity, max_tokens = served.identity, served.max_tokens

            def __call__(self, completions):
                calls.append(len(completions))
                if len(calls) == 3:
                    servers[0].send_signal(signal.SIGKILL)
                    servers[0].wait()
                return served(completions)

        with pytest.raises(ConfigError, match="does not answer /score.*go on from the last checkpoint"):
            train(urls[0], "killed", Killing())
        assert [step.name for step in list_checkpoints(tmp_path / "killed")] == ["step_1", "step_2"]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        other = requests.get(f"{urls[1]}/info", headers=headers, timeout=30).json() | {"model": "c" * 64}
        with (
            StubServer(lambda path, body: (200, other)) as stub,
            pytest.raises(ConfigError, match="reward.url: .*trained on the scores of .* and c+ is there now"),
        ):
            train(stub.url, "killed")
        resumed = train(urls[1], "killed")
        assert [reproducible(row) for row in resumed] == [reproducible(row) for row in whole]
        forget_precision()
        engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
        loaded = [str(folder / "rm"), engine, 16, "float32", str(folder / "policy")]
        settings = changes | {"reward": {"function": None, "path": loaded[0]}}
        local = RewardModelScorer.load(*loaded)
        by_path = run_online(folder / "policy", tmp_path / "local", settings, local)
        assert_close([reproducible(row) for row in by_path], [reproducible(row) for row in whole], 1e-4)
    finally:
        for server in servers:
            server.kill()
            server.communicate()
        forget_precision()


def test_a_run_whose_rows_may_be_longer_than_the_server_takes_is_refused(folder, tmp_path):
    class Bounded:
        max_tokens = 12

        def __call__(self, completions):
            raise AssertionError("nothing is to be scored")

    settings = {"reward": {"function": None, "url": "http://127.0.0.1:9"}}
    with pytest.raises(ConfigError, match="reward.url: prompts and responses take up to .* model has 12 pos"):
        run_online(folder / "policy", tmp_path / "long", settings, Bounded())
    forget_precision()


@pytest.mark.slow
def test_training_waits_for_a_killed_server_then_stops_and_resumes_equal_to_an_uninterrupted_run(folder):
    """Whole processes: the first kill is followed by a restart in time, the second by none."""
    recipe = {**ONLINE, "num_steps": 8, "model": {"path": "policy"}}
    recipe["reward"] = {
        "batch_size": 16,
        "shaping": {"missing_stop": "none"},
        "server": {"timeout_minutes": 1.0},
    }
    write_recipe(folder / "served.yaml", recipe)
    port = free_port()
    url = f"reward.url=http://127.0.0.1:{port}"
    server = start_command(folder / "rm", port)
    try:
        wait_until_up(server, port)
        run(plain("drpo"), "served.yaml", url, "run_dir=whole", cwd=folder)
        process = start(plain("drpo"), "served.yaml", url, "run_dir=killed", cwd=folder)
        wait_for_step(process, folder / "killed", 2)
        os.kill(server.pid, signal.SIGKILL)
        server.communicate()
        server = start_command(folder / "rm", port)
        wait_for_step(process, folder / "killed", 4)
        os.kill(server.pid, signal.SIGKILL)
        server.communicate()
        assert process.wait(timeout=300) == 1
        assert "waited reward.server.timeout_minutes=1" in (folder / "log.txt").read_text()
        server = start_command(folder / "rm", port)
        wait_until_up(server, port)
        out = run(plain("drpo"), "served.yaml", url, "run_dir=killed", cwd=folder)
        assert "resuming killed after step" in out
        assert metrics_of(folder / "killed") == metrics_of(folder / "whole")
        weights = [
            (folder / name / "policy" / "model.safetensors").read_bytes() for name in ("killed", "whole")
        ]
        assert weights[0] == weights[1]
    finally:
        server.kill()
        server.communicate()
