"""Runs that are made once, and intervals over seeds."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest

from launch.command_line import StageFailed
from launch.seed_grid import RunGrid, interval, launch_once


def test_the_interval_is_students_over_seeds():
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975; 2 degrees of freedom) = 4.302653 (tables)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_a_failed_run_is_named_with_its_log_and_not_taken_for_done(tmp_path):
    with pytest.raises(StageFailed, match="sft.py .*failed with code 1; see .*log.txt"):
        launch_once("sft", "demo/no_such_recipe.yaml", tmp_path / "run", [], num_jobs=2)
    assert "no recipe demo/no_such_recipe.yaml" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "command.txt").exists()


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
