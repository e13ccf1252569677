"""SIGTERM while a run waits for a server that never answers: real processes and sockets, a checkpoint to go on from."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from killed_runs import start
from online_runs import save_tiny_policy
from reward_servers import StubServer, free_port
from stub_rollout_server import StubRolloutServer
from tiny_runs import ONLINE, ddp, metrics_of, plain, run, write_recipe

PROMPTLY = 60
"Seconds, half of what one request may take by default."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("waits")
    save_tiny_policy(folder / "policy")
    recipe = {**ONLINE, "num_steps": 3, "model": {"path": "policy"}, "checkpoint": {"every": 0}}
    reward = {"shaping": {"missing_stop": "none"}, "server": {"kind": "openrlhf"}}
    write_recipe(folder / "scored.yaml", {**recipe, "reward": reward})
    write_recipe(folder / "sampled.yaml", {**recipe, "rollout": {**ONLINE["rollout"], "engine": "vllm"}})
    return folder


class Silence:
    """Falls silent at the call of a number, from 1, for good."""

    def __init__(self, number: int) -> None:
        self.left, self.begun, self._never = number, threading.Event(), threading.Event()
        self._turn = threading.Lock()

    def __call__(self) -> None:
        with self._turn:
            self.left -= 1
        if self.left == 0:
            self.begun.set()
            self._never.wait(10 * PROMPTLY)


def terminated(process, silence: Silence) -> int:
    try:
        assert silence.begun.wait(180)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout=PROMPTLY)
    finally:
        process.kill()


def scoring(port: int, silence: Silence | None = None) -> StubServer:
    def act(path, body):
        if silence is not None:
            silence()
        return 200, {"rewards": [len(text) % 7 / 7 for text in body["query"]]}

    return StubServer(act, port)


def to_the_end(folder: Path, launcher, name: str, port: int) -> list[dict[str, float]]:
    with scoring(port) as server:
        run(launcher("drpo"), "scored.yaml", f"reward.url={server.url}", f"run_dir={name}", cwd=folder)
    return metrics_of(folder / name)


@pytest.mark.parametrize(
    "launcher, number",
    [(plain, 5), pytest.param(ddp, 10, marks=pytest.mark.slow)],
    ids=["one process", "one of two processes"],
)
def test_a_run_that_waits_for_scores_saves_its_last_step(folder, launcher, number):
    """The calls of a process: evaluation, steps 1 and 2, evaluation, step 3."""
    name, silence, port = f"stopped_{launcher.__name__}", Silence(number), free_port()
    with scoring(port, silence) as server:
        url = f"reward.url={server.url}"
        code = terminated(start(launcher("drpo"), "scored.yaml", url, f"run_dir={name}", cwd=folder), silence)
    assert code == 128 + signal.SIGTERM or launcher is ddp
    assert f"SIGTERM: saved {name}/checkpoints/step_2" in (folder / "log.txt").read_text()
    whole = to_the_end(folder, launcher, f"whole_{launcher.__name__}", port)
    assert to_the_end(folder, launcher, name, port) == whole and [row["step"] for row in whole] == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.slow
def test_a_run_that_waits_within_an_evaluation_leaves_the_last_checkpoint(folder):
    silence = Silence(4)
    with scoring(0, silence) as server:
        options = (f"reward.url={server.url}", "run_dir=evaluating", "checkpoint.every=1")
        code = terminated(start(plain("drpo"), "scored.yaml", *options, cwd=folder), silence)
    assert code == 128 + signal.SIGTERM
    log = (folder / "log.txt").read_text()
    assert "SIGTERM: run the same command again to go on from the last checkpoint" in log
    [checkpoint] = (folder / "evaluating" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("path, number", [("/inference/v1/generate", 45), ("/collective_rpc", 4)])
def test_a_run_that_waits_for_rollouts_saves_its_last_step(folder, path, number):
    """Rows: 8 of the evaluation and 16 of every step; weights go before the evaluation and before every step."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    name, silence = f"rollouts_{number}", Silence(number)

    class Falling(StubRolloutServer):
        def act(self, called, body):
            if called == path:
                silence()
            return super().act(called, body)

    with Falling(policy, max_model_len=256) as server:
        options = (f"rollout.vllm.urls=[{server.url}]", f"run_dir={name}", "eval.every=3")
        code = terminated(start(plain("drpo"), "sampled.yaml", *options, cwd=folder), silence)
    assert code == 128 + signal.SIGTERM
    assert f"SIGTERM: saved {name}/checkpoints/step_2" in (folder / "log.txt").read_text()
