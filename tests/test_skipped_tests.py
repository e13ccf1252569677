"""The suite says at its end what it skipped and how to get it (tests/conftest.py)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tiny_runs import CLEAN, ROOT

TESTS = """
import pytest

def test_a(chromium): ...
def test_b(chromium): ...
def test_c(): ...
@pytest.mark.skipif(True, reason="no such file (get it there)")
def test_d(): ...
"""


def summary(folder: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code, and what a suite of TESTS shows on a machine without a browser."""
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env=CLEAN | {"PATH": "", "DRPO_REQUIRE_CHROMIUM": ""} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.splitlines()


def test_skipped_tests_are_named_by_reason_at_the_end(tmp_path):
    code, lines = summary(tmp_path)
    assert code == 0
    assert lines[-3:-1] == [
        "2 skipped: browser tests need chromium on the PATH (apt-get install chromium)",
        "1 skipped: no such file (get it there)",
    ]
    assert lines[-1].startswith("1 passed, 3 skipped")


def test_a_browser_that_is_required_is_not_skipped(tmp_path):
    code, lines = summary(tmp_path, DRPO_REQUIRE_CHROMIUM="1")
    assert code == 1
    assert lines[-1].startswith("1 passed, 1 skipped, 2 errors")
