"""launch/judge.py on one store: several systems in one process, reruns without a network, full disks, bad files."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
from judge_commands import CHAT, NUM, folder, recipe, rows_of, start, wait_for
from stub_judge_server import (
    KEY,
    MODEL,
    Reply,
    StubServer,
    chat_completion,
    first_slot_wins,
    in_turn,
    longer_wins,
)
from tiny_runs import CLEAN, plain, started

from drpo.config import load_recipe
from drpo.run.stopped import RunStopped
from eval.judging.judge_systems import JudgeRecipe
from eval.judging.judge_systems import judge as run
from eval.judging.judgments import read_verdicts
from eval.judging.openai.store import Store

__all__ = ["folder"]  # the fixture

AUTO = {"form": "auto"}


def summary(name: str) -> dict:
    return json.loads(Path(name, "summary.json").read_text())


def test_several_systems_on_one_store_in_one_process(folder):
    """The probe is paid once, matchups that two runs share are paid once, and what a run leaves open is closed."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StubServer(longer_wins) as server:
        shared = {"store": "all.sqlite", "judge": AUTO}
        run(recipe(server, folder, run_dir="a", **shared))
        assert server.paths.count(CHAT) == 1 + 2 * NUM
        run(recipe(server, folder, run_dir="b", system="null", baseline="long", **shared))
        assert server.paths.count(CHAT) == 1 + 4 * NUM, "no second probe"
        run(recipe(server, folder, run_dir="c", **shared))
        run(recipe(server, folder, run_dir="d", system="long", baseline="good", **shared))
        assert server.paths.count(CHAT) == 1 + 4 * NUM, "the same questions, in the other direction too"
    assert [summary(name)["win_rate"]["rate"] for name in "abcd"] == [0.0, 0.0, 0.0, 1.0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    Store("all.sqlite").close()


def test_what_is_answered_needs_no_server_no_key_and_no_model(folder, monkeypatch, capsys):
    with StubServer(longer_wins) as server:
        asked = recipe(server, folder, judge=AUTO)
        run(asked)
        first, counts = rows_of(folder), summary("run")
    monkeypatch.delenv("STUB_KEY")
    (folder / "run" / "judgments.jsonl").unlink()
    capsys.readouterr()
    run(asked)
    assert rows_of(folder) == first and summary("run") == counts
    assert "12 questions, 12 of them answered in the store: 0 calls" in capsys.readouterr().out


def test_a_model_that_is_gone_takes_no_verdicts_with_it(folder):
    """Half of them are paid when the model is shut down; the files still hold them."""
    quota = Reply(429, {"error": {"message": "quota", "code": "insufficient_quota"}})
    with StubServer(in_turn(*[first_slot_wins] * 6, quota)) as server:
        with pytest.raises(RunStopped, match="6 of 12 verdicts"):
            run(recipe(server, folder, limits={"concurrency": 1}, judge={"probe": False}))
        server.models = {MODEL: "2026-01-01"}
        with pytest.raises(RunStopped, match="was shut down on 2026-01-01.* 6 of 12 verdicts"):
            run(recipe(server, folder, limits={"concurrency": 1}, judge={"probe": False}))
    assert len(rows_of(folder)) == 6 and summary("run")["win_rate"]["rate"] == 0.5


# --- stops ------------------------------------------------------------------------------------------------


def test_a_second_interrupt_ends_at_once_and_loses_nothing(folder):
    def hang_later(shown, count):
        return longer_wins(shown, count) if len(server.chats) <= 4 else Reply(hang=True)

    with StubServer(hang_later) as server:
        recipe(server, folder, judge={"probe": False}, retry={"timeout": 300.0})
        process = start(folder)
        wait_for(lambda: len(server.texts()) == 8, process)
        process.send_signal(signal.SIGINT)
        first = process.stdout.readline()
        while "SIGINT: waiting" not in first:
            first = process.stdout.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=400)
        assert process.returncode == -signal.SIGINT and "Traceback" not in err
        server.behaviour = longer_wins
        run(load_recipe(JudgeRecipe, folder / "judge.yaml", []))
    assert len(server.chats) == 2 * NUM + 4, "the four that hung were asked again"


SLOW = """
import time

def scores(completions):
    print("scoring", flush=True)
    time.sleep(0.5)
    return [float(len(c.response)) for c in completions]
"""


def test_an_interrupt_ends_offline_judging_too(folder):
    """512 questions a chunk: the first is finished, the others are not begun."""
    (folder / "slow.py").write_text(SLOW)
    lines = []
    for system in ("x", "y"):
        for i in range(1500):
            lines.append({"instruction": f"post {i}", "output": system * (1 + i % 7), "generator": system})
    (folder / "c.json").write_text(json.dumps(lines))
    settings = {"run_dir": "run", "completions": ["c.json"], "system": "x", "baseline": "y"}
    settings["judge"] = {"kind": "function", "function": "slow:scores"}
    (folder / "judge.yaml").write_text(json.dumps(settings))
    process = started(plain("judge"), "judge.yaml", cwd=folder, env={**CLEAN, "PYTHONPATH": str(folder)})
    assert process.stdout.readline() == "scoring\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1 and "SIGINT: stopped" in err and "512 of 3000 verdicts" in err, err
    assert out.count("scoring") == 0 and len(read_verdicts(folder / "run" / "judgments.jsonl")) == 512


# --- disks and files --------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_what_was_kept_is_not_asked_again(folder):
    """The system refuses to let any file grow beyond a limit, as a full disk would."""
    long = json.dumps({"comparison": "x" * 30_000, "preferred": "A"})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    with StubServer(lambda shown, count: Reply(body=chat_completion(long))) as server:
        recipe(server, folder, judge={"probe": False}, limits={"concurrency": 1})
        command = [*plain("judge"), "judge.yaml"]
        environment = {**CLEAN, "STUB_KEY": KEY, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=limit
        )
        assert done.returncode == 1, done.stderr
        assert "the run cannot write its files (" in done.stderr and "Traceback" not in done.stderr
        num_sent = len(server.chats)
        with closing(Store(folder / "run" / "verdicts.sqlite")) as store:
            num_kept = len(store.calls())
        assert num_sent - 1 == num_kept > 2, "the answer that the disk did not take, and no other"
        run(load_recipe(JudgeRecipe, folder / "judge.yaml", []))
        assert len(server.chats) == 2 * NUM + 1


def test_a_results_folder_that_cannot_be_is_told(folder):
    (folder / "taken").write_text("a file")
    with StubServer() as server:
        with pytest.raises(RunStopped, match="the run cannot write its files .*taken"):
            run(recipe(server, folder, run_dir="taken"))
    assert server.paths == []


def test_a_damaged_store_is_told(folder):
    with StubServer(longer_wins) as server:
        asked = recipe(server, folder)
        run(asked)
        path = folder / "run" / "verdicts.sqlite"
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        num_asked = len(server.chats)
        with pytest.raises(ValueError, match="verdicts.sqlite is (damaged|not a store of verdicts)"):
            run(asked)
    assert len(server.chats) == num_asked


def test_completions_with_repeats_or_gaps_are_counted(folder):
    lines = (folder / "completions.jsonl").read_text().splitlines()
    with StubServer() as server:
        (folder / "twice.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
        with pytest.raises(ValueError, match="1 rows are bad:\n.*repeated row"):
            run(recipe(server, folder, completions=["twice.jsonl"]))
        (folder / "gaps.jsonl").write_text("\n".join(lines[:-1]) + "\n")
        with pytest.raises(ValueError, match="not given the same prompts:\n.*no response of long"):
            run(recipe(server, folder, completions=["gaps.jsonl"]))
    assert server.paths == []
