"""launch/judge.py in a user's folder, on the completions of two systems and a stub server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from judge_runs import matchups
from stub_judge_server import (
    KEY,
    MODEL,
    StubServer,
)
from tiny_runs import CLEAN, plain, started
from warm_python import WarmProcess

from drpo.config import load_recipe
from eval.completions.rows import CompletionRow, CompletionsWriter
from launch.judge import JudgeRecipe

NUM = 6

CHAT = "POST /v1/chat/completions"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with the completions of two systems."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUB_KEY", KEY)
    rows = []
    for c in matchups(NUM):
        for system, response in ((c.system_a, c.response_a), (c.system_b, c.response_b)):
            rows.append(CompletionRow(system, c.prompt_id, c.prompt, response, True, 9, 0, c.response_a))
    CompletionsWriter(tmp_path / "completions.jsonl", {}).write(rows)
    return tmp_path


def settings(server: StubServer, **changes) -> dict:
    known = {
        "run_dir": "run",
        "completions": ["completions.jsonl"],
        "system": "good",
        "baseline": "long",
        "prompt": "tldr-1",
        "judge": {"model": MODEL, "base_url": server.url, "api_key_env": "STUB_KEY", "form": "json"},
        "retry": {"base_delay": 0.01, "max_attempts": 2, "timeout": 30.0},
        "limits": {"concurrency": 4},
    }
    known["judge"] |= changes.pop("judge", {})
    return {**known, **changes}


def recipe(server: StubServer, folder: Path, **changes) -> JudgeRecipe:
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump(settings(server, **changes)))
    return load_recipe(JudgeRecipe, path, [])


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "judgments.jsonl").read_text().splitlines()]


def start(folder: Path, *arguments: str) -> WarmProcess:
    return started(plain("judge"), "judge.yaml", *arguments, cwd=folder, env={**CLEAN, "STUB_KEY": KEY})


def wait_for(condition, process: WarmProcess, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
