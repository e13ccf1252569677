"""A run's folder: opening, resuming, refusing, moving aside, and leaving on a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from online_runs import forget_precision
from torch import nn

from drpo.config import Section
from drpo.engine import Engine, EngineConfig
from drpo.run import lock as folder_lock
from drpo.run.checkpoints import CheckpointError, list_checkpoints
from drpo.run.folder import CheckpointConfig, LogConfig, Resume, RunFolder, flatten
from drpo.run.metrics import read_metrics
from drpo.run.signals import graceful_shutdown
from drpo.trainers.finite import finite_or_stop


@dataclass(frozen=True)
class Thing:
    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["a"])


@dataclass(frozen=True)
class Recipe:
    run_dir: str
    num_steps: int = 4
    resume: Resume = "auto"
    thing: Thing = field(default_factory=Thing)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=2))
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(trackers=[]))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(run_dir=str(tmp_path / "runs" / "x"))


@pytest.fixture(autouse=True)
def handlers():
    """The signal handlers of the test runner, back in place after each test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def opened(recipe: Recipe) -> tuple[RunFolder, dict | None]:
    config = replace(recipe.engine, trackers=[])
    engine = Engine(config, Path(recipe.run_dir), 0, max_grad_norm=None)
    module = nn.Linear(1, 1)
    engine.prepare(module, torch.optim.AdamW(module.parameters()))
    run = RunFolder(recipe, engine)
    with graceful_shutdown():
        return run, run.open()


def steps(run: RunFolder, first: int, last: int, num_steps: int = 4) -> None:
    """What a trainer does in each step."""
    for step in range(first, last + 1):
        run.record(step, {"train/loss": 1 / step}, ("train/loss",))
        run.samples.write({"step": step, "text": "a"}, {"step": step, "text": "b"})
        run.write_resets(step, {"lengths": {"0": 1}})
        run.save(step, num_steps, {"kl": step / 10})


def written_steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


# --- flatten --------------------------------------------------------------------------------------------


def test_flatten_gives_dotted_keys_and_json_values(recipe):
    assert flatten(replace(recipe, run_dir="r")) == {
        "run_dir": "r",
        "num_steps": 4,
        "resume": "auto",
        "thing.rate": 0.5,
        "thing.names": ["a"],
        "log.every": 1,
        "log.samples_every": 20,
        "log.num_samples": 4,
        "checkpoint.every": 2,
        "checkpoint.keep": 2,
        "checkpoint.model_every": 0,
        "engine.mixed_precision": None,
        "engine.trackers": [],
        "engine.project": "drpo",
        "engine.timeout_minutes": 60.0,
    }


@dataclass(frozen=True)
class Inner(Section):
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer(Section):
    rate: float = 0.5
    inner: Inner | None = None


@dataclass(frozen=True)
class Listed(Section):
    outers: list[Outer] = field(default_factory=list)


def test_sections_in_lists_are_their_settings_that_are_not_at_their_defaults():
    """So that neither the order of the fields nor a new one makes a run look like another."""
    listed = Listed(outers=[Outer(rate=0.25), Outer(inner=Inner(names=["b"])), Outer()])
    assert flatten(listed) == {"outers": [{"rate": 0.25}, {"inner": {"names": ["b"]}}, {}]}


# --- fresh and resumed runs -----------------------------------------------------------------------------


def test_a_fresh_run_makes_its_folder_and_says_its_settings(recipe):
    run, state = opened(recipe)
    assert state is None
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert (saved["num_steps"], saved["thing"]) == (4, {"rate": 0.5, "names": ["a"]})


def test_a_run_saves_when_it_is_time_and_at_the_end(recipe):
    run, _ = opened(replace(recipe, num_steps=5, checkpoint=CheckpointConfig(every=2, keep=9)))
    steps(run, 1, 5, num_steps=5)
    assert [folder.name for folder in list_checkpoints(run.path)] == ["step_2", "step_4", "step_5"]


def test_every_0_saves_at_the_end_only(recipe):
    run, _ = opened(replace(recipe, checkpoint=CheckpointConfig(every=0)))
    steps(run, 1, 4)
    assert [folder.name for folder in list_checkpoints(run.path)] == ["step_4"]


def test_resuming_gives_the_state_and_drops_what_came_after_it(recipe):
    run, _ = opened(recipe)
    steps(run, 1, 3)
    with run.metrics.path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # a kill in the middle of a line
    run, state = opened(recipe)
    assert (state["step"], state["kl"], state["world_size"]) == (2, 0.2, 1)
    assert written_steps(run.metrics.path) == [1, 2]
    assert written_steps(run.samples.path) == [1, 1, 2, 2]
    assert written_steps(run.resets.path) == [1, 2]
    steps(run, 3, 4)
    assert written_steps(run.metrics.path) == written_steps(run.resets.path) == [1, 2, 3, 4]


def test_a_run_killed_before_its_first_checkpoint_starts_again(recipe):
    run, _ = opened(recipe)
    run.record(0, {"eval/score": 1.0}, ())
    steps(run, 1, 1)
    run, state = opened(recipe)
    assert state is None
    assert written_steps(run.metrics.path) == []


def test_a_run_that_failed_before_its_first_step_may_be_mended(recipe):
    opened(replace(recipe, num_steps=2))
    run, state = opened(recipe)
    assert state is None
    assert yaml.safe_load((run.path / "config.yaml").read_text())["num_steps"] == 4
    run.record(1, {"train/loss": 1.0}, ())
    with pytest.raises(CheckpointError, match="num_steps: 4 -> 2"):
        opened(replace(recipe, num_steps=2))


def test_a_finished_run_is_resumed_after_its_last_step(recipe):
    run, _ = opened(recipe)
    steps(run, 1, 4)
    run, state = opened(recipe)
    assert state["step"] == 4
    assert written_steps(run.metrics.path) == [1, 2, 3, 4]


# --- other settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_steps": 8}, "num_steps: 4 -> 8"),
        ({"thing": Thing(rate=0.25)}, "thing.rate: 0.5 -> 0.25"),
        ({"thing": Thing(names=["a", "b"])}, "thing.names: ['a'] -> ['a', 'b']"),
    ],
)
def test_another_recipe_is_refused_naming_what_changed(recipe, change, named):
    run, _ = opened(recipe)
    steps(run, 1, 2)
    before = (run.path / "config.yaml").read_bytes(), run.metrics.path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        opened(replace(recipe, **change))
    assert named in str(caught.value) and "resume=restart" in str(caught.value)
    assert str(caught.value).count("->") == 1
    assert ((run.path / "config.yaml").read_bytes(), run.metrics.path.read_bytes()) == before


def test_the_folder_says_what_precision_null_stood_for(recipe):
    run, _ = opened(recipe)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["engine"]["mixed_precision"] == "no"
    steps(run, 1, 2)
    named = replace(recipe, engine=EngineConfig(trackers=[], mixed_precision="no"))
    assert opened(named)[1]["step"] == 2


@pytest.mark.parametrize("last", [1, 2], ids=["before the first checkpoint", "after it"])
def test_a_run_does_not_go_on_in_another_precision(recipe, last):
    """As where null stands for bf16 on one machine and for float32 on the next."""
    run, _ = opened(recipe)
    steps(run, 1, last)
    forget_precision()
    try:
        with pytest.raises(CheckpointError) as caught:
            opened(replace(recipe, engine=EngineConfig(trackers=[], mixed_precision="bf16")))
    finally:
        forget_precision()
    message = str(caught.value)
    assert "settings: engine.mixed_precision: 'no' -> 'bf16'. " in message
    assert "engine.mixed_precision=no to keep" in message and "resume=restart" in message


def test_a_key_that_the_earlier_run_did_not_have_counts_as_its_default(recipe):
    run, _ = opened(recipe)
    steps(run, 1, 2)
    state = run.path / "checkpoints" / "step_2" / "trainer.json"
    saved = json.loads(state.read_text())
    del saved["settings"]["thing.rate"]
    state.write_text(json.dumps(saved))
    assert opened(replace(recipe, thing=Thing()))[1]["step"] == 2
    with pytest.raises(CheckpointError, match="thing.rate: 0.5 -> 0.25"):
        opened(replace(recipe, thing=Thing(rate=0.25)))


def test_an_earlier_recipe_that_is_none_today_is_named_with_its_file(recipe):
    run, _ = opened(recipe)
    steps(run, 1, 1)
    config = run.path / "config.yaml"
    config.write_text(config.read_text() + "\nold_key: 3\n")
    with pytest.raises(
        CheckpointError, match=r"config.yaml, left by an earlier run, .*old_key[^$]*resume=restart"
    ):
        opened(recipe)


def test_one_process_at_a_time_trains_in_a_folder(recipe, monkeypatch):
    """Whoever holds it may open it again, and whoever was killed holds it no more."""
    code = "import sys, time; from pathlib import Path; from drpo.run.lock import hold_folder\n"
    code += "hold_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, recipe.run_dir], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.0)
        with pytest.raises(
            CheckpointError, match="another process is training in .*; wait for it or stop it"
        ):
            opened(recipe)
        monkeypatch.undo()
        threading.Timer(0.5, other.kill).start()  # it is waited for
        run, _ = opened(recipe)
    steps(run, 1, 2)
    assert opened(recipe)[1]["step"] == 2


def test_what_does_not_change_the_numbers_may_change(recipe, tmp_path):
    run, _ = opened(recipe)
    steps(run, 1, 2)
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    other = replace(
        recipe,
        run_dir=str(moved),
        log=LogConfig(every=7, samples_every=0),
        checkpoint=CheckpointConfig(every=1, keep=5),
        engine=EngineConfig(trackers=["tensorboard"], project="other"),
    )
    _, state = opened(other)
    assert state["step"] == 2


def test_restart_moves_the_run_aside_and_begins_anew(recipe):
    run, _ = opened(recipe)
    steps(run, 1, 2)
    for number in (1, 2):
        run, state = opened(replace(recipe, resume="restart", thing=Thing(rate=number)))
        assert state is None and [p.name for p in run.path.iterdir()] == ["config.yaml"]
        steps(run, 1, 4)
    aside = run.path.with_name("x.old1")
    assert written_steps(aside / "metrics.jsonl") == [1, 2]
    assert [folder.name for folder in list_checkpoints(aside)] == ["step_2"]
    assert written_steps(run.path.with_name("x.old2") / "metrics.jsonl") == [1, 2, 3, 4]
    assert sorted(p.name for p in run.path.parent.iterdir()) == ["x", "x.old1", "x.old2"]


def test_restart_of_a_run_that_is_not_there_just_begins(recipe):
    run, state = opened(replace(recipe, resume="restart"))
    assert state is None
    assert [p.name for p in run.path.parent.iterdir()] == ["x"]


# --- signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_leaves_with_its_code(recipe, number, capsys, handlers):
    run, _ = opened(recipe)
    os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as caught:
        steps(run, 1, 4)
    assert caught.value.code == 128 + number
    assert [folder.name for folder in list_checkpoints(run.path)] == ["step_1"]
    said = capsys.readouterr().out
    assert number.name in said and "same command" in said
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    _, state = opened(recipe)
    assert state["step"] == 1


def test_closing_gives_the_signals_back(recipe, handlers):
    run, _ = opened(recipe)
    assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    run.close()
    run.close()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


# --- what is written ------------------------------------------------------------------------------------


def test_every_step_is_in_the_file_and_some_on_the_console(recipe, capsys):
    run, _ = opened(replace(recipe, log=LogConfig(every=2)))
    for step in range(5):
        run.record(step, {"train/loss": step / 4, "train/other": 9.0}, ("train/loss", "train/absent"))
    assert [json.loads(line) for line in run.metrics.path.read_text().splitlines()] == [
        {"step": step, "train/loss": step / 4, "train/other": 9.0} for step in range(5)
    ]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert lines == ["step 0: loss 0", "step 1: loss 0.25", "step 2: loss 0.5", "step 4: loss 1"]


def test_samples_go_to_the_file_and_the_first_to_the_console(recipe, capsys):
    run, _ = opened(replace(recipe, log=LogConfig(num_samples=1)))
    row = {"prompt": "P [bold]", "prefix": "forced ", "ended": True, "scores": {"score": 0.5}}
    run.write_samples(3, [row | {"continuation": "alpha"}, row | {"continuation": "beta"}])
    run.write_samples(4, [])
    written = read_metrics(run.samples.path)
    assert [(r["step"], r["continuation"], r["prefix"]) for r in written] == [
        (3, "alpha", "forced "),
        (3, "beta", "forced "),
    ]
    shown = capsys.readouterr().out
    assert "alpha" in shown and "beta" not in shown and "[bold]" in shown


# --- safety ---------------------------------------------------------------------------------------------


def test_finite_values_pass(recipe):
    run, _ = opened(recipe)
    finite_or_stop(run.engine, run.path, 1, torch.tensor([[1.0, -2.0], [3.0, 1e38]]), "the loss")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stops_naming_step_rows_and_checkpoint(recipe, bad):
    run, _ = opened(recipe)
    values = torch.tensor([[1.0, 2.0], [3.0, bad], [bad, bad]])
    with pytest.raises(FloatingPointError) as caught:
        finite_or_stop(run.engine, run.path, 7, values, "the reward", ["a:1", "a:2", "b:9"])
    message = str(caught.value)
    assert message.startswith("step 7: the reward is not finite in row(s) 1 (a:2), 2 (b:9) of rank 0")
    assert message.endswith("last checkpoint: none")
    steps(run, 1, 2)
    with pytest.raises(FloatingPointError, match="last checkpoint: .*step_2$"):
        finite_or_stop(run.engine, run.path, 7, values[:, 1], "the loss")


@pytest.mark.parametrize(
    "config, wrong, key",
    [
        (CheckpointConfig, {"every": -1}, "every must be >= 0"),
        (CheckpointConfig, {"keep": 0}, "keep must be >= 1"),
        (LogConfig, {"every": 0}, "every must be >= 1"),
        (LogConfig, {"samples_every": -1}, "samples_every must be >= 0"),
        (LogConfig, {"num_samples": 0}, "num_samples must be >= 1"),
    ],
)
def test_impossible_settings_name_the_key(config, wrong, key):
    with pytest.raises(ValueError, match=key):
        config(**wrong)
