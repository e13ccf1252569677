"""Fixtures for whole runs; what they need is imported when they are used, for it takes seconds."""

from __future__ import annotations

import os

# One thread: the models are tiny, and a process that has used OpenMP's threads cannot be forked.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A saved random GPT-NeoX with its tokenizer."""
    from online_runs import save_tiny_policy

    folder = tmp_path_factory.mktemp("policy")
    save_tiny_policy(folder)
    return folder


@pytest.fixture
def preference_run(policy_folder, tmp_path) -> Iterator[Callable[..., tuple[list[dict], Path]]]:
    """`preference_run(**changes)` runs offline_runs.PREFERENCE with changes in this process: its metrics, its folder.

    `name=` names the folder, to run in it again.
    """
    from offline_runs import reproducible_rows, run_preference
    from online_runs import forget_precision

    count = 0

    def start(name: str | None = None, policy: Path = policy_folder, **changes) -> tuple[list[dict], Path]:
        nonlocal count
        count += 1
        run_dir = tmp_path / (name or f"run{count}")
        _, rows = run_preference(policy, run_dir, **changes)
        return reproducible_rows(rows), run_dir

    yield start
    forget_precision()


@pytest.fixture
def online_run(policy_folder, tmp_path) -> Iterator[Callable[..., tuple[list[dict], Path]]]:
    """`online_run(**changes)` runs online_runs.RECIPE with changes in this process: its metrics and its folder."""
    from online_runs import forget_precision, run_online, true_rewards

    count = 0

    def start(reward_fn=true_rewards, **changes) -> tuple[list[dict], Path]:
        nonlocal count
        count += 1
        run_dir = tmp_path / f"run{count}"
        return run_online(policy_folder, run_dir, changes, reward_fn), run_dir

    yield start
    forget_precision()
