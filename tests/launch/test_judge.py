"""launch/judge.py: the demo offline, and a model behind an API: killed, stopped, resumed, refused, checked first."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sqlite3
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from judge_commands import NUM, folder, recipe, rows_of, start, wait_for
from judge_runs import matchups
from stub_judge_server import (
    KEY,
    MODEL,
    Reply,
    StubServer,
    chat_completion,
    error,
    first_slot_wins,
    in_turn,
    longer_wins,
    more_of_the_post_wins,
)

from drpo.config import ConfigError, load_recipe
from drpo.run.stopped import RunStopped
from eval.completions.rows import prompt_id_of
from eval.judging.judge_systems import JudgeRecipe
from eval.judging.judge_systems import judge as run
from eval.judging.judgments import read_verdicts
from eval.judging.openai.store import Store
from launch.command_line import find_recipe
from launch.demo_inputs import LAUNCH

__all__ = ["folder"]  # the fixture

# --- a whole run ------------------------------------------------------------------------------------------


def test_a_run_leaves_a_line_for_each_call_and_a_summary(folder, capsys):
    with StubServer(in_turn("Hm.", more_of_the_post_wins, "Hm.", more_of_the_post_wins)) as server:
        path = run(recipe(server, folder, limits={"concurrency": 1}, judge={"probe": False}))
    rows = rows_of(folder)
    assert path == Path("run/judgments.jsonl") and len(rows) == 14
    assert [row["final"] for row in rows[:4]] == [False, True, False, True]
    assert [row["status"] for row in rows[:4]] == ["malformed", "ok", "malformed", "ok"]
    assert [row["order"] for row in rows] == ["ab", "ab", "ba", "ba", *["ab", "ba"] * 5]
    first = rows[1]
    assert first["prompt_id"] == prompt_id_of(matchups()[0].prompt)
    assert (first["winner"], first["text"]) == ("a", '{"comparison": "One is better.", "preferred": "A"}')
    assert (first["model_returned"], first["fingerprint"]) == (f"{MODEL}-2026-01-01", "fp_1")
    assert (first["prompt_tokens"], first["completion_tokens"], first["num_attempts"]) == (400, 30, 1)
    assert (first["judge"], first["prompt_name"]) == (MODEL, "tldr-1") and "openai 3." in first["versions"]
    assert first["time"].startswith("20") and len(first["key"]) == 64
    summary = json.loads((folder / "run" / "summary.json").read_text())
    rate = summary["win_rate"]
    assert (rate["wins"], rate["losses"], rate["undecided"], rate["rate"]) == (6, 0, 0, 1.0)
    assert rate["low"] == pytest.approx(6 / (6 + 1.959964**2)), "Wilson's limit of 6 of 6"
    assert (summary["position_bias"]["consistency"]["agreement"], summary["statuses"]["ok"]) == (1.0, 12)
    assert summary["length_controlled"] is None and "on 6 prompts" in summary["length_controlled_missing"]
    assert summary["spent"]["calls"] == 14 and summary["spent"]["prompt_tokens"] == 14 * 400
    printed = capsys.readouterr().out
    assert "12 questions, 0 of them answered in the store: 12 calls" in printed
    assert "good against long: 6 comparisons, 6 won, 0 tied, 0 lost, 0 undecided" in printed
    assert "win rate 100.0% [61.0%, 100.0%] over 6 prompts" in printed
    assert KEY not in (folder / "run" / "config.yaml").read_text()
    assert [v.winner for v in read_verdicts(path)] == ["a"] * 12


@pytest.mark.parametrize("body", ["return 1 / 0", "return [1.0]", "return None", 'return ["x" for _ in c]'])
def test_a_function_that_does_not_score_is_told_in_one_line(folder, monkeypatch, body):
    (folder / "my_judge.py").write_text(f"def score(c):\n    {body}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_judge", raising=False)
    judge = {"kind": "function", "function": "my_judge:score"}
    known = {"run_dir": "run", "completions": ["completions.jsonl"], "system": "good", "baseline": "long"}
    (folder / "judge.yaml").write_text(yaml.safe_dump({**known, "judge": judge}))
    with pytest.raises(
        ConfigError, match="judge.function='my_judge:score' does not score|returned 1 scores for 12"
    ):
        run(load_recipe(JudgeRecipe, folder / "judge.yaml", []))


def test_the_demo_recipe_runs_offline(tmp_path, monkeypatch, capsys):
    """Its annotator's labels against the true reward; 256 posts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["judge.py"])
    runpy.run_path(str(LAUNCH / "judge.py"), run_name="__main__")  # which makes the completions
    path = Path(capsys.readouterr().out.splitlines()[-1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 512 and all(row["final"] and "key" not in row for row in rows)
    for row in rows:
        better = row["scores"][0] - row["scores"][1]
        assert row["winner"] == ("tie" if better == 0 else "a" if better > 0 else "b")
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary["position_bias"]["consistency"]["agreement"] == 1.0
    rate, controlled = summary["win_rate"], summary["length_controlled"]
    assert 0.6 < rate["low"] < rate["rate"] < rate["high"] < 1.0 and rate["num_prompts"] == 256
    assert controlled["low"] < controlled["rate"] < controlled["high"] and "spent" not in summary
    first = path.read_bytes()
    run(load_recipe(JudgeRecipe, find_recipe("demo/judge.yaml"), []))
    assert path.read_bytes() == first


def test_an_attack_and_the_null_model_are_systems(folder):
    with StubServer(more_of_the_post_wins) as server:
        run(recipe(server, folder, system="attack/verdict_lines", baseline="null", max_undecided=1.0))
        verdicts = read_verdicts("run/judgments.jsonl")
        run(recipe(server, folder, system="null", baseline="reference"))
    assert {v.winner for v in verdicts} == {"tie"}
    assert all(v.suspicions_a == ("announces a verdict",) and v.suspicions_b == () for v in verdicts)
    assert {v.winner for v in read_verdicts("run/judgments.jsonl")} == {"b"}


# --- kill, stop, resume -----------------------------------------------------------------------------------


def stored(folder: Path) -> list[str]:
    """The user messages whose answers are committed."""
    path = folder / "run" / "verdicts.sqlite"
    if not path.exists():
        return []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        try:
            rows = db.execute("SELECT request FROM calls WHERE status != 'failed'").fetchall()
        except sqlite3.OperationalError:  # not made yet
            return []
    return [json.loads(request)["messages"][-1]["content"] for (request,) in rows]


def test_kill_9_loses_no_answer_and_no_answer_is_paid_twice(folder, capsys):
    """Some requests are answered, the others hang; the process is killed without warning and started again."""
    num_answered, place = 5, itertools.count()

    def answer_some(shown, count):
        return longer_wins(shown, count) if next(place) < num_answered else Reply(hang=True)

    with StubServer(answer_some) as server:
        recipe(server, folder, judge={"probe": False}, budget={"max_calls": 100})
        process = start(folder)
        wait_for(lambda: len(stored(folder)) == num_answered, process)
        wait_for(lambda: len(server.texts()) == num_answered + 4, process)  # all workers hang
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        paid = server.answered_texts()
        assert sorted(paid) == sorted(stored(folder)) and len(paid) == num_answered
        assert not (folder / "run" / "judgments.jsonl").exists()

        server.behaviour = longer_wins
        run(load_recipe(JudgeRecipe, folder / "judge.yaml", []))
    assert "4 requests had no end when an earlier run was killed" in capsys.readouterr().out
    answered = server.answered_texts()
    assert len(answered) == 2 * NUM == len(set(answered)), "each answer was paid once"
    texts = server.texts()
    assert [texts.count(text) for text in paid] == [1] * num_answered
    assert len(texts) == 2 * NUM + 4, "only what had no answer was asked again"
    assert len(read_verdicts(folder / "run" / "judgments.jsonl")) == 2 * NUM


def test_an_interrupt_waits_for_what_is_under_way_and_writes_what_there_is(folder):
    def slowly(shown, count):
        text = json.dumps({"comparison": "", "preferred": "A"})
        return Reply(body=chat_completion(text), wait=0.0 if len(server.chats) <= 4 else 1.0)

    with StubServer(slowly) as server:
        recipe(server, folder, judge={"probe": False})
        process = start(folder)
        wait_for(lambda: len(server.texts()) >= 5, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=400)
        num_sent = len(server.chats)
        assert process.returncode == 1 and "SIGINT: stopped" in err and "goes on from there" in err
        assert "Traceback" not in err
        assert num_sent < 2 * NUM and len(rows_of(folder)) == num_sent == len(server.answered_texts())
        run(recipe(server, folder, judge={"probe": False}))
    assert len(server.chats) == 2 * NUM


def test_a_stop_writes_what_there_is_and_fails(folder, capsys):
    quota = error(429, "You exceeded your current quota", "insufficient_quota")
    with StubServer(in_turn(*[first_slot_wins] * 5, quota)) as server:
        with pytest.raises(
            RunStopped, match="quota is used up.* 4 of 12 verdicts are in run/judgments.jsonl"
        ):
            run(recipe(server, folder, limits={"concurrency": 1}))
    assert len(rows_of(folder)) == 4, "one of the five answers was the probe's"
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["asked"], summary["num_comparisons"]) == (12, 2)
    assert (summary["store"]["num_requests"], summary["store"]["num_open"]) == (6, 0)


def test_a_comparison_that_was_half_asked_when_the_run_stopped_has_no_score(folder):
    quota = error(429, "You exceeded your current quota", "insufficient_quota")
    with StubServer(in_turn(*[first_slot_wins] * 3, quota)) as server:
        with pytest.raises(RunStopped, match="3 of 12 verdicts"):
            run(recipe(server, folder, limits={"concurrency": 1}, judge={"probe": False}))
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["num_comparisons"], summary["undecided"]) == (2, 1)
    rate = summary["win_rate"]
    assert (rate["rate"], rate["worst_case"], rate["best_case"]) == (0.5, 0.25, 0.75)
    assert summary["position_bias"]["num_calls"] == 2, "the third call has no other order"


def test_failures_and_undecided_comparisons_beyond_what_is_allowed_fail_the_run(folder):
    def no_answer_for_one(shown, count):
        return error(500, "oops") if "rabbit000" in shown.material else longer_wins(shown, count)

    with StubServer(no_answer_for_one) as server:
        with pytest.raises(RunStopped, match="2 of 12 questions got no answer, more than max_failed=0 "):
            run(recipe(server, folder))
        assert len(rows_of(folder)) == 12
        server.behaviour = lambda shown, count: "Hm."
        with pytest.raises(
            RunStopped, match="1 of 6 comparisons are undecided, more than max_undecided=0.05"
        ):
            run(recipe(server, folder))
        run(recipe(server, folder, max_undecided=0.2))


def test_reasons_for_missing_verdicts_are_reported(folder, capsys):
    flagged = Reply(403, {"error": {"message": "Input flagged", "metadata": {"reasons": ["violence"]}}})

    def behave(shown, count):
        if "rabbit000" in shown.material:
            return flagged
        return "Hm." if "rabbit001" in shown.material else longer_wins(shown, count)

    with StubServer(behave) as server:
        run(recipe(server, folder, max_undecided=0.5))
    said = capsys.readouterr().out
    assert "  2 refused: HTTP 403: Input flagged (violence)\n" in said and "  2 malformed: not JSON" in said
    found = json.loads((folder / "run" / "summary.json").read_text())["reasons"]
    assert [(row["status"], row["count"]) for row in found] in (
        [("refused", 2), ("malformed", 2)],
        [("malformed", 2), ("refused", 2)],
    )


# --- before the run ---------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_would_cost_and_asks_nothing(folder, capsys):
    prices = {"as_of": "today", "batch_factor": 0.5, "models": {MODEL: {"input": 1.0, "output": 2.0}}}
    (folder / "prices.yaml").write_text(yaml.safe_dump(prices))
    with StubServer() as server:
        with pytest.raises(RunStopped, match="dry_run"):
            run(recipe(server, folder, budget={"dry_run": True, "prices": "prices.yaml"}))
    assert server.paths == []
    assert "12 calls, about " in (out := capsys.readouterr().out) and "at most $0.0" in out
    assert "(prices of today)" in out


REFUSED = [
    ({"budget": {"max_usd": 1.0}}, "budget.max_usd needs a price of stub-judge"),
    ({"prompt": None}, "prompt must say what the judge is asked"),
    ({"prompt": "tldr-9"}, "prompt='tldr-9' is none of tldr-1"),
    ({"judge": {"model": None}}, "judge.model must name the model"),
    ({"judge": {"api_key_env": "NOT_SET"}}, "environment variable NOT_SET"),
    ({"system": None}, "system one of their systems"),
    ({"system": "goood"}, "no responses of system 'goood'; there are: good, long"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_asked(folder, change, message):
    with StubServer() as server:
        with pytest.raises(ValueError, match=message):
            run(recipe(server, folder, **change))
    assert server.paths == []


WRONG = [
    ({"kind": "function", "model": "m"}, {}, "judge.model does not apply to judge.kind=function"),
    ({"kind": "openai", "path": "x"}, {}, "judge.path does not apply to judge.kind=openai"),
    ({"kind": "function"}, {"prompt": "tldr-1"}, "prompt does not apply to judge.kind=function"),
    ({"kind": "function"}, {"ties": False}, "ties=false does not apply to judge.kind=function: equal"),
    ({"kind": "function"}, {"budget": {"max_calls": 3}}, "budget does not apply"),
    (
        {"kind": "openai"},
        {"batch": {"poll_seconds": 3}},
        "batch does not apply to .* it is for judge.backend=batch",
    ),
    ({"form": "auto", "probe": False}, {}, "judge.form=auto is found out by the probe"),
    ({}, {"orders": "one", "half_tie": "tie"}, "half_tie does not apply to orders=one"),
    ({}, {"seed": 3}, "seed does not apply to orders=both"),
    ({}, {"max_undecided": 2.0}, "max_undecided must be >= 0 and <= 1, got 2"),
    ({"temperature": 3.0}, {}, "judge.temperature must be >= 0 and <= 2 or null, got 3"),
    ({"temperature": float("nan")}, {}, "judge.temperature is nan; give a finite number"),
    ({"base_url": ""}, {}, "judge.base_url must begin with http"),
    ({"base_url": "localhost:8000/v1"}, {}, "judge.base_url must begin with http"),
    ({"model": " "}, {}, "judge.model must be a name or null"),
    ({"reasoning_effort": ""}, {}, "judge.reasoning_effort must be a name or null"),
    ({}, {"budget": {"max_usd": float("nan")}}, "budget.max_usd is nan; give a finite number"),
]


@pytest.mark.parametrize(("judge", "rest", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_options_that_do_not_apply_are_refused(tmp_path, judge, rest, message):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"judge": judge, **rest}))
    with pytest.raises(ConfigError, match=message):
        load_recipe(JudgeRecipe, path, [])


def test_a_key_that_can_be_none_is_told_without_being_shown(folder, monkeypatch):
    monkeypatch.setenv("STUB_KEY", "sk-sécret\nx")
    with StubServer() as server:
        with pytest.raises(ConfigError, match="STUB_KEY holds no API key") as told:
            run(recipe(server, folder))
    assert "sk-" not in str(told.value) and server.paths == []


def test_fewer_prompts_than_asked_for_are_said(folder, capsys):
    with StubServer(longer_wins) as server:
        run(recipe(server, folder, num_prompts=1000))
        assert "num_prompts=1000, but the files have 6 prompts" in capsys.readouterr().out
        run(recipe(server, folder, num_prompts=2))
    assert json.loads((folder / "run" / "summary.json").read_text())["num_comparisons"] == 2


def test_two_runs_on_one_store_are_refused(folder):
    with StubServer(longer_wins) as server:
        held = Store(folder / "run" / "verdicts.sqlite")
        with pytest.raises(ValueError, match="is in use by another run"):
            run(recipe(server, folder))
        held.close()
        run(recipe(server, folder))


def test_the_recipe_is_kept_beside_the_results(folder):
    with StubServer(longer_wins) as server:
        first = recipe(server, folder)
        run(first)
    assert asdict(load_recipe(JudgeRecipe, folder / "run" / "config.yaml", [])) == asdict(first)
