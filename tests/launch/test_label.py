"""launch/label.py: a real server process that is killed and started again, what it labels and refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from label_runs import BETTER, WORSE, Client, better_slot, matchups
from tiny_runs import CLEAN, finished, plain, started

from drpo.config import ConfigError, load_recipe
from drpo.data.records import DataError
from eval.completions.rows import CompletionRow, CompletionsWriter
from eval.labelling.label import LabelRecipe, matchups_to_label
from eval.labelling.label import label as run
from eval.labelling.labels import read_labels
from launch.command_line import find_recipe
from launch.demo_inputs import make_demo_inputs

# --- the process ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with the completions of two systems."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for c in matchups(5):
        for system, response in ((c.system_a, c.response_a), (c.system_b, c.response_b)):
            rows.append(CompletionRow(system, c.prompt_id, c.prompt, response, True, 9, 0, "the reference"))
    CompletionsWriter(tmp_path / "completions.jsonl", {}).write(rows)
    known = {"completions": ["completions.jsonl"], "system": BETTER, "baseline": WORSE, "prompt": "tldr-1"}
    (tmp_path / "label.yaml").write_text(yaml.safe_dump({**known, "run_dir": "run"}))
    return tmp_path


class Process:
    """launch/label.py as users start it; `url` is what it printed."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        env = {**CLEAN, "PYTHONUNBUFFERED": "1"}
        self.process = started(
            plain("label"), "label.yaml", *arguments, cwd=folder, env=env, err=subprocess.STDOUT
        )
        self.printed = ""
        while "Ctrl-C" not in self.printed:
            line = self.process.stdout.readline()
            assert line, self.printed
            self.printed += line
        self.url = re.search(r"open (http://127\.0\.0\.1:\d+/)", self.printed)[1]

    def end(self, number: signal.Signals) -> int:
        os.kill(self.process.pid, number)
        self.printed += self.process.stdout.read()
        return self.process.wait(timeout=60)


def test_kill_9_loses_no_label_and_the_same_command_goes_on(folder):
    path = folder / "run" / "labels.jsonl"
    process = Process(folder)
    anna, ben = Client(process.url, "anna"), Client(process.url, "ben")
    for client, num in ((anna, 3), (ben, 1)):
        for _ in range(num):
            pair = client.state()["pair"]
            assert client.label(pair["id"], better_slot(pair))[0] == 200
    left = anna.state()["pair"]["prompt"]
    assert process.end(signal.SIGKILL) == -signal.SIGKILL
    assert len(read_labels(path)) == 4, "what was answered is on disk"
    with path.open("ab") as file:
        file.write(b'{"prompt_id": "12')  # as if it had been killed in the middle of a line

    process = Process(folder)
    assert "anna: 3 of 5 done" in process.printed and "ben: 1 of 5 done" in process.printed
    anna = Client(process.url, "anna")
    state = anna.state()
    assert (state["done"], state["pair"]["prompt"]) == (3, left)
    for client in (anna, Client(process.url, "ben")):
        while pair := client.state()["pair"]:
            client.label(pair["id"], better_slot(pair))
    assert process.end(signal.SIGTERM) == 0
    assert process.printed.splitlines()[-1] == str(path)
    assert "anna: 5 of 5 done" in process.printed
    labels = read_labels(path)
    assert len(labels) == 10 and {label.winner for label in labels} == {"a"}
    assert len({(label.annotator, label.prompt_id) for label in labels}) == 10
    assert (folder / "run" / "config.yaml").exists()


def test_annotators_in_the_recipe_get_an_address_each(folder):
    process = Process(folder, "annotators=[anna,Ben K.]", "num_prompts=2", "ties=false", "seed=3")
    assert f"open {process.url}?annotator=anna\n" in process.printed
    assert f"open {process.url}?annotator=Ben%20K.\n" in process.printed
    assert "anna: 0 of 2 done" in process.printed
    client = Client(process.url, "anna")
    pair = client.state()["pair"]
    assert client.label(pair["id"], "tie")[0] == 400
    second = finished(plain("label"), "label.yaml", cwd=folder)
    assert second.returncode == 1 and "is open in another run of launch/label.py" in second.stderr
    assert process.end(signal.SIGINT) == 0


# --- what is labelled -------------------------------------------------------------------------------------


def recipe(**changes) -> LabelRecipe:
    known = {"completions": ["completions.jsonl"], "system": BETTER, "baseline": WORSE, "prompt": "tldr-1"}
    return LabelRecipe(**{**known, **changes})


def test_equal_responses_are_left_out_and_counted(folder, capsys):
    rows = [
        CompletionRow(system, c.prompt_id, c.prompt, text, True, 1, 0)
        for i, c in enumerate(matchups(3))
        for system, text in (("one", " alike"), ("two", "alike \n" if i < 2 else " other"))
    ]
    CompletionsWriter("alike.jsonl", {}).write(rows)
    (left,) = matchups_to_label(recipe(completions=["alike.jsonl"], system="one", baseline="two"))
    assert left.prompt == matchups(3)[2].prompt
    assert "2 of 3 pairs are left out: equal responses" in capsys.readouterr().out
    CompletionsWriter("same.jsonl", {}).write(rows[:4])
    with pytest.raises(DataError, match="nothing to label"):
        matchups_to_label(recipe(completions=["same.jsonl"], system="one", baseline="two"))


def test_num_prompts_and_systems_without_rows_are_those_of_the_judge(folder):
    wanted = sorted(c.prompt_id for c in matchups(5))[:2]
    assert sorted(c.prompt_id for c in matchups_to_label(recipe(num_prompts=2))) == wanted
    against = matchups_to_label(recipe(baseline="reference"))
    assert {c.response_b for c in against} == {"the reference"}


def test_the_demo_recipe_has_pairs_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = load_recipe(LabelRecipe, find_recipe("demo/label.yaml"), [])
    make_demo_inputs(*demo.completions)
    compared = matchups_to_label(demo)
    assert 30 < len(compared) <= 40 and {(c.system_a, c.system_b) for c in compared} == {
        ("chosen", "rejected")
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_prompts": 0}, "num_prompts must be >= 1"),
        ({"port": 70000}, "port must be >= 0 and <= 65535"),
        ({"annotators": ["<b>"]}, "not an annotator's name"),
        ({"annotators": [" anna"]}, "annotators must be plain names"),
        ({"annotators": ["anna", "Anna"]}, "upper and lower case"),
        ({"host": "0.0.0.0"}, "host must be one address"),
        ({"host": "::"}, "host must be one address"),
        ({"host": "my-machine"}, "host must be an address"),
    ],
)
def test_options_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        recipe(**change)


def test_what_is_missing_is_named(folder):
    for changes, message in (
        ({"completions": []}, "completions must name files"),
        ({"system": None}, "completions must name files"),
        ({"prompt": None}, "prompt must say what the annotators are asked"),
        ({"prompt": "tldr"}, "is none of tldr-1"),
        ({"host": "203.0.113.7"}, "cannot listen on 203.0.113.7"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(recipe(**changes))
