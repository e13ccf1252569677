"""Two real processes, each with a disk or settings of its own as on two machines: both stop, and say why."""

from __future__ import annotations

import json
import re

import pytest
from tiny_runs import ROOT, accelerate, run

TOLD_TO_BOTH = {
    "own, fresh": r"run_dir: process 1 of 2 cannot see what process 0 writes to .*same run_dir on a file system",
    "own, resumed": r"run_dir: process 1 of 2 cannot see what process 0 writes",
    "unwritable": r"run_dir: .*file/x cannot be written to: ",
    "settings": r"processes 0 and 1 have different settings: num_steps: 2 and 3\. Start all processes",
    "token ids": r"have different data: digest of the training rows: 'digest 0' and 'digest 1'",
    "data": r"processes 0 and 1 have different data: data: '100 pairs' and '101 pairs'",
    "cache, own": r"reference\.cache_dir: process 1 of 2 cannot see",
    "completions, own": r"run_dir: process 1 of 2 cannot see",
}


TOO_LONG_TO_WAIT = {
    "reward wait": "reward.server.timeout_minutes=6 and request_seconds=60: a process may wait 7.16667 minutes",
    "vllm wait": "rollout.vllm.timeout_minutes=9: a process may wait 9.18333 minutes",
}


@pytest.fixture(scope="module", params=["ddp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def told(request, tmp_path_factory) -> list[dict]:
    """What each process is told in each case."""
    folder = tmp_path_factory.mktemp("views")
    config = {"ddp": "cpu.yaml", "deepspeed": "zero2.yaml"}[request.param]
    options = ["--config_file", str(ROOT / "launch" / "accelerate" / config), "--num_processes", "2"]
    options += ["--mixed_precision", "no", "--main_process_port", "0"]
    script = str(ROOT / "tests" / "support" / "two_views.py")
    run([*accelerate(), *options, script], str(folder), cwd=folder)
    return [json.loads((folder / f"told_{rank}.json").read_text()) for rank in range(2)]


def test_shared_folder_is_opened_and_resumed_by_both(told):
    for each in told:
        assert (each["shared, fresh"], each["shared, resumed"]) == (None, 2)
        assert (each["cache, shared"], each["cache, none"], each["completions"]) == (True, False, 0)


@pytest.mark.parametrize("case", TOLD_TO_BOTH)
def test_difference_between_processes_stops_both_with_its_key(told, case):
    assert told[0][case] == told[1][case] or "machine_" in told[0][case]
    for each in told:
        assert re.search(TOLD_TO_BOTH[case], each[case])


def test_check_leaves_nothing_behind(told):
    for each in told:
        assert each["left"] == [] and not each["own, left"]


def test_timeout_of_the_recipe_is_that_of_the_process_group(told):
    assert [each["timeout"] for each in told] == [7 * 60, 7 * 60]


@pytest.mark.parametrize("case", TOO_LONG_TO_WAIT)
def test_wait_that_outlasts_the_process_group_is_refused(told, case):
    for each in told:
        assert each[case].startswith(TOO_LONG_TO_WAIT[case])
        assert "engine.timeout_minutes=7 only" in each[case]
        assert each["short wait"] is None
