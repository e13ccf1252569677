"""Real rollouts by vLLM servers: the trainer needs no vLLM, and trains as with vLLM in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import yaml
from online_runs import save_tiny_policy
from tiny_models import tiny_model
from tiny_runs import ROOT
from vllm_checks import MAX_TOKENS, SIZES
from vllm_runs import ENVIRONMENT, RolloutServer, assert_same, call, metrics_of, needs_vllm, recipe_file

from drpo.run.metrics import read_metrics

pytestmark = [needs_vllm, pytest.mark.timeout(1200)]
DRPO = str(ROOT / "launch/drpo.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_tiny_policy(folder / "policy", hidden_size=64)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = RolloutServer(folder / "policy", 200, folder / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def colocated(folder):
    call([DRPO, str(recipe_file(folder, "colocated", {"enforce_eager": True}))])
    return metrics_of(folder / "colocated")


@pytest.mark.parametrize("model_type, trained", [("gpt_neox", "full"), ("llama", "lora")])
def test_logprobs_are_the_trainers_after_two_updates_too(tmp_path, model_type, trained):
    sizes = SIZES | ({"num_key_value_heads": 1} if model_type == "llama" else {})
    tiny_model(model_type, **sizes).save_pretrained(tmp_path / "policy")
    server = RolloutServer(tmp_path / "policy", MAX_TOKENS, tmp_path / "log")
    try:
        checks = [str(ROOT / "tests/support/vllm_checks.py"), model_type, trained, "no", server.url]
        found = json.loads(call(checks, python=sys.executable).splitlines()[-1])
    finally:
        server.kill()
    assert max(found["mean_differences"]) < 1e-5 and max(found["max_differences"]) < 1e-3
    assert found["stale_difference"] > 0.1, "the same check sees a server that was not updated"
    assert found["repeated"] and found["alone_equal"], "float32 on a CPU: rounding does not show"
    assert set(found["lengths_of_many"]) <= {1, 2} and len(found["lengths_of_many"]) == 40


def test_a_run_is_that_of_vllm_in_the_training_process(folder, server, colocated):
    call([DRPO, str(recipe_file(folder, "served", {"urls": [server.url]}))], python=sys.executable)
    served = metrics_of(folder / "served")
    assert_same(served, colocated)
    assert len(served) == 4 and served[2]["eval/kl"] > 0.1
    assert all(row["rollout/logprob_difference"] < 1e-5 for row in served[1:])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_make_the_run_of_one(folder, server, colocated, tmp_path, stage):
    path = recipe_file(folder, f"two{stage}", {"urls": [server.url]})
    if stage == 0:
        call(["-m", "torch.distributed.run", "--nproc_per_node=2", DRPO, str(path)], python=sys.executable)
    else:
        config = yaml.safe_load((ROOT / f"launch/accelerate/zero{stage}.yaml").read_text())
        accelerate = tmp_path / "zero.yaml"
        accelerate.write_text(yaml.safe_dump(config | {"num_processes": 2, "mixed_precision": "no"}))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate), DRPO, str(path)]
        environment = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
        call(launcher, environment, sys.executable)
    assert_same(metrics_of(folder / f"two{stage}"), colocated)


@pytest.mark.slow
def test_a_server_that_is_killed_stops_the_run_which_goes_on_later(folder):
    server = RolloutServer(folder / "policy", 200, folder / "killed.log")
    changes = {"num_steps": 12, "checkpoint": {"every": 1}, "eval": {"every": 0}}
    vllm = {"urls": [server.url], "timeout_minutes": 0.2}
    whole, killed = (recipe_file(folder, name, vllm, **changes) for name in ("whole", "killed"))
    call([DRPO, str(whole)], python=sys.executable)
    run = subprocess.Popen(
        [sys.executable, DRPO, str(killed)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "killed/metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        assert run.poll() is None
        time.sleep(0.05)
    server.kill()
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and f"rollout.vllm.urls: {server.url} does not answer" in errors
    assert "Traceback" not in errors
    again = RolloutServer(folder / "policy", 200, folder / "again.log", server.port)
    try:
        call([DRPO, str(killed)], python=sys.executable)
    finally:
        again.kill()
    assert_same(metrics_of(folder / "killed"), metrics_of(folder / "whole"))


def test_settings_of_the_server_come_from_one_place(folder, server):
    path = recipe_file(folder, "long", {"urls": [server.url]}, rollout={"max_response_length": 190})
    done = subprocess.run(
        [sys.executable, DRPO, str(path)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "takes 200 tokens, and the longest prompt with" in done.stderr
