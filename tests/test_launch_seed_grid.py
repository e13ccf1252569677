"""Runs that are made once, and intervals over seeds."""

from __future__ import annotations

import math

import pytest

from launch.seed_grid import interval, launch_once


def test_the_interval_is_students_over_seeds():
    # mean 2, standard deviation 1, standard error 1/sqrt(3), t(0.975; 2 degrees of freedom) = 4.302653 (tables)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_a_failed_run_is_named_with_its_log_and_not_taken_for_done(tmp_path):
    with pytest.raises(RuntimeError, match="sft.py .*failed with code 1; see .*log.txt"):
        launch_once("sft", "demo/no_such_recipe.yaml", tmp_path / "run", [], num_jobs=2)
    assert "no recipe demo/no_such_recipe.yaml" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "command.txt").exists()
