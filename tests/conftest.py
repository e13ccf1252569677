"""Fixtures for whole runs; what they need is imported when they are used, for it takes seconds."""

from __future__ import annotations

import os
import shutil

# One thread: the models are tiny, and a process that has used OpenMP's threads cannot be forked.
os.environ["OMP_NUM_THREADS"] = "1"
# Float32 where a recipe says nothing, whatever the machine is good at: expectations and tolerances are made for it.
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
# The suite is offline: where a name is no folder here, do not try the hub six times over half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHROMIUM_FLAGS = [
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


NO_CHROMIUM = "browser tests need chromium on the PATH (apt-get install chromium)"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """One line for each reason for which tests were skipped: a suite that is not whole says so."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}", yellow=True)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A saved random GPT-NeoX with its tokenizer."""
    from online_runs import save_tiny_policy

    folder = tmp_path_factory.mktemp("policy")
    save_tiny_policy(folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A real headless Chromium, as Playwright's Browser: `page = chromium.new_page()`.

    Where there is none the test is skipped, or fails if DRPO_REQUIRE_CHROMIUM is set, as it is in continuous
    integration. By module, since Playwright's event loop must not outlast the tests that use it.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("DRPO_REQUIRE_CHROMIUM"):
            pytest.fail(NO_CHROMIUM)
        pytest.skip(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


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
