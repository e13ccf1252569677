"""judgments.jsonl and its counts on hand-made verdicts, the estimate, and what statistics make of a biased judge."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from judge_runs import judge, judge_config, judge_setup, matchups
from stub_judge_server import (
    Reply,
    StubServer,
    chat_completion,
    longer_wins,
    verdict_text,
)

from drpo.data.records import DataError
from eval.judging.judgments import (
    read_answers,
    read_verdicts,
    spent_text,
    tokens_and_cost,
    write_judgments,
)
from eval.judging.matchup import Matchup, Question, questions_of
from eval.judging.openai.estimate import estimate
from eval.judging.openai.store import Call, Ledger, Store
from eval.judging.verdict import verdict_on
from eval.labelling.ratings import read_judge_file

# --- the file ---------------------------------------------------------------------------------------------


def call(key: str, **changes) -> Call:
    values = dict.fromkeys(Call.__dataclass_fields__)
    return Call(**{**values, "key": key, "status": "ok", "detail": "", "num_attempts": 1, **changes})


def test_verdicts_come_back_and_earlier_calls_are_lines_of_their_own(tmp_path):
    question = Question(Matchup("p", "post", "x", "aé", "y", "b\u2028"), "ab")
    asked = verdict_on(question, "ok", "b", suspicions_a=("shouts",), keys=("k0", "k1"))
    scored = verdict_on(Question(question.matchup, "ba"), "ok", "tie", scores=(1.5, 1.5))
    calls = [
        call("k0", status="malformed", text="\u2028Hm"),
        call("k1", status="failed"),
        call("k1", text="B", cost=0.5),
    ]
    path = tmp_path / "judgments.jsonl"
    write_judgments(path, [asked, scored], calls, {"judge": "j"})
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert [(r["final"], r["status"], r["winner"], r["judge"]) for r in rows] == [
        (False, "malformed", None, "j"),
        (True, "ok", "b", "j"),
        (True, "ok", "tie", "j"),
    ]
    assert (rows[0]["text"], rows[1]["text"], rows[1]["cost"]) == ("\u2028Hm", "B", 0.5)
    first, second = read_verdicts(path)
    assert (first.winner, first.suspicions_a, first.keys) == ("b", ("shouts",), ("k1",))
    assert second == scored


@pytest.mark.parametrize("cut", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_unicode_line_ends_in_answers_come_back(tmp_path, cut):
    texts = {"ab": f"One is better.{cut}Preferred: A", "ba": f"{cut}B{cut}"}
    matchup = Matchup("p", "post", "x", "a", "y", f"b{cut}")
    verdicts = [
        verdict_on(Question(matchup, order), "ok", "b", keys=(f"early {order}", order)) for order in texts
    ]
    calls = [call(order, text=text) for order, text in texts.items()]
    calls += [call(f"early {order}", text=f"Hm.{cut}", status="malformed") for order in texts]
    path = tmp_path / "judgments.jsonl"
    write_judgments(path, verdicts, calls, {"judge": f"j{cut}", "prompt_name": "tldr-1", "orders": "both"})
    assert read_answers(path) == {("p", 0, order): text for order, text in texts.items()}
    assert [(v.order, v.winner) for v in read_verdicts(path)] == [("ab", "b"), ("ba", "b")]
    found = read_judge_file(path)
    assert (found.name, found.question) == (f"j{cut}", "tldr-1")


def test_questions_without_an_answer_are_left_out(tmp_path):
    question = Question(Matchup("p", "post", "x", "a", "y", "b"), "ab")
    path = tmp_path / "judgments.jsonl"
    write_judgments(path, [verdict_on(question, "ok", "tie", scores=(1.5, 1.5))], [], {})
    assert read_answers(path) == {}
    write_judgments(
        path, [verdict_on(question, "failed", None, keys=("k",))], [call("k", status="failed")], {}
    )
    assert read_answers(path) == {}


def test_a_file_that_is_none_is_told(tmp_path):
    for read in (read_verdicts, read_answers):
        with pytest.raises(DataError, match="no judgments file"):
            read(tmp_path / "j.jsonl")
    for line in ("[" * 5000, '{"final": true}', "{", '{"final": true, "winner": "a"}', "[]"):
        (tmp_path / "j.jsonl").write_text(line + "\n")
        for read in (read_verdicts, read_answers):
            with pytest.raises(DataError, match="j.jsonl:1 is not a judgment"):
                read(tmp_path / "j.jsonl")


def test_tokens_are_added_by_kind():
    calls = [
        call("a", prompt_tokens=10, cached_tokens=4, completion_tokens=3, reasoning_tokens=2, cost=0.5),
        call("b", prompt_tokens=1, completion_tokens=1, cost=0.25),
        call("c"),
    ]
    sums = tokens_and_cost(calls)
    assert (sums["calls"], sums["prompt_tokens"], sums["cached_tokens"]) == (3, 11, 4)
    assert (sums["completion_tokens"], sums["reasoning_tokens"], sums["cost"]) == (4, 2, 0.75)
    assert tokens_and_cost([call("c")])["cost"] is None
    text = spent_text(sums, Ledger(7, 1.5, 2, 0.25))
    assert text.splitlines() == [
        "all answers used: 3 calls, 11 prompt tokens (4 cached), 4 answer tokens (2 of thought), $0.7500",
        "the store in all: 7 requests, $1.5000 at most, 2 of them without an end",
    ]
    assert "price unknown" in spent_text(tokens_and_cost([call("c")]), Ledger(1, 0.0, 0, 0.0))


# --- the estimate -----------------------------------------------------------------------------------------


def test_the_estimate_counts_what_is_open_and_bounds_what_it_costs(tmp_path):
    path = tmp_path / "s.sqlite"
    usage = {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340}

    def answer(shown, count):
        return Reply(body=chat_completion(verdict_text(shown.body, "A"), usage=usage))

    with StubServer(answer) as server:
        asked = judge_setup(judge_config(server))
        questions = questions_of(matchups(5), "both", 0)
        with closing(Store(path)) as store:
            before = estimate(asked, questions, store)
        judge(server, path, matchups(2))
        with closing(Store(path)) as store:
            after = estimate(asked, questions, store)
        spent = judge(server, path, matchups(5)).ledger.usd
        with closing(Store(path)) as store:
            done = estimate(asked, questions, store)
    assert (before.num_calls, before.num_stored, before.usd_about) == (10, 0, None)
    assert (after.num_calls, after.num_stored, after.answer_tokens_about) == (6, 4, 40)
    assert spent < before.usd_at_most and after.usd_at_most == pytest.approx(
        0.6 * before.usd_at_most, rel=0.01
    )
    sent = [
        sum(len(m["content"]) for m in c.body["messages"]) + len(json.dumps(c.body["response_format"]))
        for c in server.chats
    ]
    assert before.prompt_tokens_about == pytest.approx(sum(sent) / 4, rel=0.05)
    assert (done.num_calls, done.usd_at_most) == (0, 0) and "0 calls" in done.text()
    assert "10 questions, 0 of them" in before.text() and "(prices of now)" in before.text()


def test_questions_that_show_the_same_are_one_call(tmp_path):
    """Equal responses look alike in both orders."""
    same = Matchup("p", "post", "x", " hat", "y", " hat")
    questions = questions_of([same, *matchups(1)], "both", 0)
    with StubServer(longer_wins) as server:
        asked = judge_setup(judge_config(server))
        with closing(Store(tmp_path / "s.sqlite")) as store:
            made = estimate(asked, questions, store)
        run = judge(server, tmp_path / "s.sqlite", questions=questions)
    assert (made.num_calls, made.num_repeats, made.num_stored) == (3, 1, 0) and len(server.chats) == 3
    assert "4 questions, 0 of them answered in the store, 1 the same as others: 3 calls" in made.text()
    assert {j.prompt_id: j.score for j in run.judgments}["p"] == 0.5


def test_without_a_price_the_estimate_has_no_dollars(tmp_path):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        config = judge_config(type("server", (), {"url": "http://x/v1"}))
        made = estimate(judge_setup(config, price=None), questions_of(matchups(1), "both", 0), store)
    assert made.usd_at_most is None and "no price known" in made.text()
