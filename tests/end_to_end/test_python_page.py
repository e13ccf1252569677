"""docs/python.md does what it says: its code runs as written, and is as short as it claims."""

from __future__ import annotations

import re
import shutil

import pytest
from tiny_runs import ROOT

PAGE = ROOT / "docs" / "python.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def num_lines(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip()])


def test_the_code_of_the_page_runs(policy_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(policy_folder, tmp_path / "my_model")
    score = "def score(completions):\n    return [-abs(len(c.response.split()) - 2.0) for c in completions]\n"
    (tmp_path / "my_rewards.py").write_text(score)
    names: dict = {}
    for block in blocks():
        exec(compile(block, str(PAGE), "exec"), names)
    assert (names["policy"] / "model.safetensors").is_file()
    assert names["report"].name == "report.html" and "DR-PO" in names["report"].read_text()
    assert names["advantages"][0].tolist() == pytest.approx([0.95, 1.0])  # lambda times the last reward


def test_training_takes_twelve_lines_and_comparing_five():
    training, comparing, _ = map(num_lines, blocks())
    assert training <= 12 and comparing <= 5
