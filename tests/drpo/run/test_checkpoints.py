"""Checkpoints: whole or absent whatever kills the process, rotation, exact state."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drpo.engine import Engine, EngineConfig
from drpo.run.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    read_trainer_state,
    save_checkpoint,
)


class Run:
    """A tiny module in training in a real engine; each step depends on the weights, AdamW and torch's generator."""

    def __init__(self, run_dir: Path, seed: int = 0, width: int = 4) -> None:
        self.path = run_dir
        self.engine = Engine(EngineConfig(trackers=[]), run_dir, seed, max_grad_norm=1.0)
        self.module = nn.Linear(width, width)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.prepared = self.engine.prepare(self.module, optimizer)

    def train(self, num_steps: int) -> list[float]:
        """Losses of the steps."""
        losses = []
        for _ in range(num_steps):
            noise = torch.randn(3, self.module.in_features)
            loss = self.prepared(noise + random.random() + float(np.random.rand())).square().mean()
            self.engine.backward(loss, last=True)
            self.engine.optimizer_step()
            losses.append(loss.item())
        return losses

    def save(self, step: int, keep: int = 2, **state) -> Path:
        return save_checkpoint(self.engine, self.path, step, {"world_size": 1, **state}, keep)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.module.parameters()])


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(run_dir)]


# --- exact state ----------------------------------------------------------------------------------------


def test_training_goes_on_exactly_as_if_it_had_not_stopped(tmp_path):
    run = Run(tmp_path)
    run.train(3)
    folder = run.save(3, note={"kl": 0.1})
    expected = run.train(4), run.weights(), torch.rand(5), np.random.rand(5), random.random()

    other = Run(tmp_path, seed=7)
    other.train(2)
    state = load_checkpoint(other.engine, folder)
    assert state == {"step": 3, "world_size": 1, "note": {"kl": 0.1}}
    assert other.train(4) == expected[0]
    torch.testing.assert_close(other.weights(), expected[1], rtol=0, atol=0)
    assert torch.equal(torch.rand(5), expected[2])
    assert np.array_equal(np.random.rand(5), expected[3])
    assert random.random() == expected[4]


def test_saving_changes_nothing_for_the_run_that_goes_on(tmp_path):
    def losses(save: bool) -> list[float]:
        run = Run(tmp_path / str(save))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in run.module.parameters():
                parameter.fill_(0.5)
        first = run.train(2)
        if save:
            run.save(2)
        return first + run.train(2)

    assert losses(save=True) == losses(save=False)


def test_the_state_comes_back_as_json_has_it(tmp_path):
    folder = Run(tmp_path).save(5, kl={"coef": 0.1 + 0.2}, names=["a", None])
    assert read_trainer_state(folder) == {
        "step": 5,
        "world_size": 1,
        "kl": {"coef": 0.30000000000000004},
        "names": ["a", None],
    }


# --- which checkpoints there are ------------------------------------------------------------------------


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    run = Run(tmp_path)
    for step in (2, 9, 10, 100):
        run.save(step, keep=3)
    assert names(tmp_path) == ["step_9", "step_10", "step_100"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_100", "step_9"]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    run = Run(tmp_path)
    run.save(4, note="first")
    folder = run.save(4, note="second")
    assert names(tmp_path) == ["step_4"]
    assert read_trainer_state(folder)["note"] == "second"


def test_what_is_not_whole_is_not_a_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    assert list_checkpoints(tmp_path) == []
    for folder in ("step_1", ".partial_2", "step_3.old", "step_x", ".removed_step_4", "step_5"):
        (root / folder).mkdir(parents=True)
        if folder != "step_1":
            (root / folder / "trainer.json").write_text("{}")
    assert names(tmp_path) == ["step_5"]
    with pytest.raises(CheckpointError, match="step_1 is no checkpoint"):
        read_trainer_state(root / "step_1")


def test_what_kills_have_left_goes_with_the_next_save(tmp_path):
    run = Run(tmp_path)
    for folder in (".partial_3", ".removed_step_1"):
        (tmp_path / "checkpoints" / folder).mkdir(parents=True)
    run.save(4)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_4"]


def test_another_number_of_processes_is_refused_with_the_way_out(tmp_path):
    run = Run(tmp_path)
    before = run.weights()
    folder = run.save(3)
    run.train(1)
    state = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(state | {"world_size": 2}))
    after = run.weights()
    with pytest.raises(CheckpointError, match="written by 2 processes and this run has 1.*--num_processes 2"):
        load_checkpoint(run.engine, folder)
    assert torch.equal(run.weights(), after) and not torch.equal(before, after)


def test_weights_of_another_model_are_refused_with_the_way_out(tmp_path):
    run = Run(tmp_path)
    path = run.save(3) / "model.safetensors"
    save_file(load_file(path) | {"critic.embedding.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="(?s)step_3 holds other weights.*resume=restart.*critic.embedding"
    ):
        load_checkpoint(run.engine, path.parent)


# --- kills ----------------------------------------------------------------------------------------------

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_child(target, *arguments) -> int:
    """Exit code of `target` in a forked process; -9 after SIGKILL."""
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def save_and_die(run: Run, step: int, num_events: int) -> None:
    """Save, and SIGKILL this process right before its `num_events`-th operation on files."""
    seen = 0

    def hook(event: str, _arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS:
            seen += 1
            if seen == num_events:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run.save(step, keep=1)
    os._exit(0)  # more operations were asked for than there are


def test_a_kill_before_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    run, reader = Run(tmp_path / "run"), Run(tmp_path / "run", seed=1)
    run.train(1)
    run.save(1)
    weights = {"step_1": run.weights()}
    run.train(1)
    weights["step_2"] = run.weights()
    origin = tmp_path / "origin"
    shutil.copytree(run.path, origin)

    outcomes = []
    for num_events in range(1, 500):
        shutil.rmtree(run.path)
        shutil.copytree(origin, run.path)
        code = in_child(save_and_die, run, 2, num_events)
        left = list_checkpoints(run.path)
        assert left, f"killed before operation {num_events}: no checkpoint is left"
        for folder in left:
            state = load_checkpoint(reader.engine, folder)
            assert folder.name == f"step_{state['step']}"
            assert torch.equal(reader.weights(), weights[folder.name])
        outcomes.append((code, left[-1].name))
        if code == 0:
            break
    codes, newest = zip(*outcomes, strict=True)
    assert codes == (-signal.SIGKILL,) * (len(codes) - 1) + (0,)
    assert len(codes) > 10
    assert newest == tuple(sorted(newest)) and set(newest) == {"step_1", "step_2"}
    assert names(run.path) == ["step_2"]


def digest(run: Run) -> str:
    return hashlib.sha256(run.weights().numpy().tobytes()).hexdigest()


def save_for_ever(run: Run) -> None:
    for step in range(1, 1000):
        run.train(1)
        run.save(step, digest=digest(run))


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_a_kill_from_outside_while_a_save_is_being_written_leaves_a_whole_checkpoint(tmp_path, delay):
    run = Run(tmp_path, width=1000)
    child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(run,))
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / ".partial_3").exists():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    last = list_checkpoints(tmp_path)[-1]
    state = load_checkpoint(run.engine, last)
    assert state["step"] >= 2
    assert digest(run) == state["digest"]
