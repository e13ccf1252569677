"""Runs that are made once, and intervals over seeds."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from drpo.config import ConfigError
from launch.command_line import StageFailed
from launch.experiments import seed_grid
from launch.experiments.seed_grid import RunGrid, interval, launch_once


def test_the_interval_is_students_over_seeds():
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975; 2 degrees of freedom) = 4.302653 (tables)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """A folder of launch scripts with one, stage.py, that fails where fail=1 and else adds a line to <run_dir>/ran."""
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "stage.py").write_text(
        "import pathlib, sys\n"
        "given = dict(a.split('=', 1) for a in sys.argv[2:])\n"
        "open(pathlib.Path(given['run_dir'], 'ran'), 'a').write('once\\n')\n"
        "print('the reason')\n"
        "sys.exit(int(given.get('fail', 0)))\n"
    )
    monkeypatch.setattr(seed_grid, "LAUNCH", folder)
    return folder


def times_run(folder: Path) -> int:
    return len((folder / "ran").read_text().splitlines())


def test_a_failed_run_is_named_with_its_log_and_not_taken_for_done(scripts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("")
    for number in (1, 2):
        with pytest.raises(StageFailed, match="stage.py .*failed with code 3; see .*log.txt"):
            launch_once("stage", str(recipe), tmp_path / "run", ["fail=3"], num_jobs=2)
        assert times_run(tmp_path / "run") == number
    assert (tmp_path / "run" / "log.txt").read_text() == "the reason\n"


def test_a_run_is_made_once_and_refused_when_anything_it_came_from_has_changed(scripts, tmp_path):
    recipe, data, sft, dpo = (tmp_path / name for name in ("recipe.yaml", "data.jsonl", "sft", "dpo"))
    recipe.write_text("a: 1")
    data.write_text("rows")
    (sft / "policy").mkdir(parents=True)

    def make_sft(*more: str) -> None:
        launch_once("stage", str(recipe), sft, [f"data.path={data}", *more], num_jobs=1)

    def make_dpo() -> None:
        launch_once("stage", str(recipe), dpo, [f"model.path={sft}/policy"], num_jobs=1)

    for _ in range(2):
        make_sft()
        make_dpo()
    assert (times_run(sft), times_run(dpo)) == (1, 1)
    with pytest.raises(
        ConfigError, match=r"sft holds a run from other inputs \(command changed\); move it away"
    ):
        make_sft("num_steps=3")
    data.write_text("other rows")
    with pytest.raises(ConfigError, match=r"\(data.path changed\)"):
        make_sft()
    sft.rename(tmp_path / "sft_before")
    (sft / "policy").mkdir(parents=True)
    make_sft()
    with pytest.raises(ConfigError, match=r"dpo holds a run from other inputs \(model.path changed\)"):
        make_dpo()
    recipe.write_text("a: 2")
    with pytest.raises(ConfigError, match=r"sft .*\(recipe changed\)"):
        make_sft()


def test_a_run_on_several_models_is_refused_when_one_of_them_was_made_again(scripts, tmp_path):
    recipe, parents, joint = tmp_path / "recipe.yaml", [tmp_path / name for name in "ab"], tmp_path / "joint"
    recipe.write_text("")

    def make(parent: Path, *more: str) -> None:
        (parent / "reward_model").mkdir(parents=True)
        launch_once("stage", str(recipe), parent, more, num_jobs=1)

    def make_joint() -> None:
        paths = ",".join(f"{parent}/reward_model" for parent in parents)
        launch_once("stage", str(recipe), joint, [f"reward.ensemble.paths=[{paths}]"], num_jobs=1)

    for parent in parents:
        make(parent)
    for _ in range(2):
        make_joint()
    assert times_run(joint) == 1
    parents[1].rename(tmp_path / "before")
    make(parents[1], "num_steps=3")
    with pytest.raises(ConfigError, match=r"joint .*\(reward.ensemble.paths\[1\] changed\)"):
        make_joint()


def test_the_first_failure_drops_the_jobs_that_have_not_begun():
    begun, failing = [], threading.Event()

    def job(number: int) -> None:
        begun.append(number)
        if number == 1:
            failing.set()
            raise StageFailed("job 1; see its log")
        failing.wait()
        time.sleep(0.2)  # job 0 still runs when the failure is noticed

    with pytest.raises(StageFailed, match="job 1"), RunGrid(num_jobs=2, num_runs=40) as grid:
        for number in range(40):
            grid.submit(job, number)
    assert {0, 1} <= set(begun) and len(begun) < 10, begun


def test_ctrl_c_drops_the_jobs_that_have_not_begun():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a launch script
    begun = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt), RunGrid(num_jobs=2, num_runs=200) as grid:
        for number in range(200):
            grid.submit(job, number)
        grid.wait()
    signal.signal(signal.SIGINT, before)
    assert len(begun) < 50, begun


def test_a_job_may_wait_for_those_before_it_and_a_failed_need_fails_it():
    with RunGrid(num_jobs=1, num_runs=2) as grid:
        first = grid.submit(lambda: 3)
        second = grid.submit(lambda: first.result() + 1)
    assert second.result() == 4
    with pytest.raises(StageFailed), RunGrid(num_jobs=2, num_runs=2) as grid:
        need = grid.submit(_fail)
        after = grid.submit(lambda: need.result())
    assert after.cancelled() or isinstance(after.exception(), StageFailed)


def _fail() -> None:
    raise StageFailed("as asked")


def test_a_long_text_in_a_recipe_is_no_path(scripts, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"reward: {{format: {'x' * 300}}}")
    launch_once("stage", str(recipe), tmp_path / "run", [], num_jobs=1)
    assert times_run(tmp_path / "run") == 1


def test_what_a_recipe_names_is_an_input_too_unless_it_is_overridden(scripts, tmp_path):
    recipe, data, other = (tmp_path / name for name in ("recipe.yaml", "data.jsonl", "other.jsonl"))
    recipe.write_text(f"models: [{{path: {data}}}]\ndata: {{path: {other}}}")
    data.write_text("rows")
    other.write_text("rows")

    def make() -> None:
        launch_once("stage", str(recipe), tmp_path / "run", ["data.path=elsewhere"], num_jobs=1)

    make()
    other.write_text("other rows")
    make()
    data.write_text("other rows")
    with pytest.raises(ConfigError, match=r"\(models\[0\].path changed\)"):
        make()
