"""judgments.jsonl and its counts on hand-made verdicts, the estimate, and what statistics make of a biased judge."""

from __future__ import annotations

import json
import random
from contextlib import closing

import numpy as np
import pytest
from judge_runs import asking, comparisons, judge, judge_config
from stub_judge_server import (
    Reply,
    Shown,
    StubServer,
    chat_completion,
    first_slot_wins,
    longer_wins,
    verdict_text,
)

from drpo.data.records import DataError
from eval.completions import prompt_id_of
from eval.judging.comparison import Comparison, Question, questions_of
from eval.judging.estimate import estimate
from eval.judging.judgments import read_judgments, summarise, summary_text, tokens_and_cost, write_judgments
from eval.judging.store import Call, Store
from eval.judging.verdict import combine_all, verdict_on
from eval.length_control import length_controlled_win_rate
from eval.position_bias import position_bias
from eval.win_rate import win_rate


def both(name: str, ab, ba, suspicions=((), ())) -> list:
    """Verdicts on one comparison: winners, or statuses where there is none."""
    made = []
    for order, outcome in (("ab", ab), ("ba", ba)):
        ok = outcome in ("a", "b", "tie")
        question = Question(Comparison(name, "post", "x", "aa", "y", "b"), order)
        status, winner = ("ok", outcome) if ok else (outcome, None)
        made.append(verdict_on(question, status, winner, "", suspicions))
    return made


VERDICTS = [
    *both("win", "a", "a"),
    *both("win, but shouts", "a", "a", (("shouts",), ())),
    *both("loss", "b", "b"),
    *both("flip", "a", "b"),
    *both("half", "a", "tie"),
    *both("lost to one who shouts", "b", "b", ((), ("shouts",))),
    *both("refused", "a", "refused"),
    *both("failed", "failed", "failed"),
]


def test_counts_by_hand():
    summary = summarise(combine_all(VERDICTS), VERDICTS)
    assert (summary["wins"], summary["ties"], summary["losses"], summary["undecided"]) == (3, 1, 2, 2)
    score = 1 + 1 + 0 + 0.5 + 0.75 + 0
    assert summary["rate"] == pytest.approx(score / 6)
    assert (summary["all_lose"], summary["all_win"]) == pytest.approx((score / 8, (score + 2) / 8))
    assert summary["consistent"] == pytest.approx(4 / 6)
    # slots: 1+0, 1+0, 0+1, 1+1, 1+0.5, 0+1, 1 of 13 verdicts
    assert summary["first_slot_wins"] == pytest.approx(8.5 / 13)
    assert summary["statuses"] == {"ok": 13, "refused": 1, "malformed": 0, "truncated": 0, "failed": 2}
    assert summary["suspected"] == {"a": {"responses": 1, "score": 1.0}, "b": {"responses": 1, "score": 1.0}}
    text = summary_text(summary, "x", "y")
    assert "8 comparisons, 3 won, 1 tied, 2 lost, 2 undecided" in text
    assert "naive rate 54.2%" in text and "40.6% if x lost" in text and "65.6% if it won" in text
    assert "1 responses of y look like attempts to sway the judge; they won 1" in text


def test_nothing_decided_has_no_rate():
    verdicts = both("p", "refused", "malformed")
    summary = summarise(combine_all(verdicts), verdicts)
    assert summary["rate"] is None and (summary["all_lose"], summary["all_win"]) == (0.0, 1.0)
    assert "naive rate -" in summary_text(summary, "x", "y")


def test_the_same_bounds_as_the_statistics():
    """`win_rate` and the counts are two ways to the same numbers."""
    judgments = combine_all(VERDICTS)
    scores = [np.nan if j.score is None else j.score for j in judgments]
    rate, summary = win_rate(scores), summarise(judgments, VERDICTS)
    assert (rate.rate, rate.worst_case, rate.best_case) == pytest.approx(
        tuple(summary[name] for name in ("rate", "all_lose", "all_win"))
    )
    assert (rate.wins, rate.ties, rate.losses, rate.undecided) == (3, 1, 2, 2)


# --- the file ---------------------------------------------------------------------------------------------


def call(key: str, **changes) -> Call:
    values = dict.fromkeys(Call.__dataclass_fields__)
    return Call(**{**values, "key": key, "status": "ok", "detail": "", "num_attempts": 1, **changes})


def test_verdicts_come_back_and_earlier_calls_are_lines_of_their_own(tmp_path):
    question = Question(Comparison("p", "post", "x", "aé", "y", "b\u2028"), "ab")
    asked = verdict_on(question, "ok", "b", suspicions=(("shouts",), ()), keys=("k0", "k1"))
    scored = verdict_on(Question(question.comparison, "ba"), "ok", "tie", scores=(1.5, 1.5))
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
    first, second = read_judgments(path)
    assert (first.winner, first.suspicions_a, first.keys) == ("b", ("shouts",), ("k1",))
    assert second == scored


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(DataError, match="no judgments file"):
        read_judgments(tmp_path / "j.jsonl")
    for line in ('{"final": true}', "{", '{"final": true, "winner": "a"}', "[]"):
        (tmp_path / "j.jsonl").write_text(line + "\n")
        with pytest.raises(DataError, match="j.jsonl:1 is not a judgment"):
            read_judgments(tmp_path / "j.jsonl")


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


# --- the estimate -----------------------------------------------------------------------------------------


def test_the_estimate_counts_what_is_open_and_bounds_what_it_costs(tmp_path):
    path = tmp_path / "s.sqlite"
    usage = {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340}

    def answer(shown, count):
        return Reply(body=chat_completion(verdict_text(shown.body, "A"), usage=usage))

    with StubServer(answer) as server:
        asked = asking(judge_config(server))
        questions = questions_of(comparisons(5), "both", 0)
        with closing(Store(path)) as store:
            before = estimate(asked, questions, store)
        judge(server, path, comparisons(2))
        with closing(Store(path)) as store:
            after = estimate(asked, questions, store)
        spent = judge(server, path, comparisons(5)).ledger.usd
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
    same = Comparison("p", "post", "x", " hat", "y", " hat")
    questions = questions_of([same, *comparisons(1)], "both", 0)
    with StubServer(longer_wins) as server:
        asked = asking(judge_config(server))
        with closing(Store(tmp_path / "s.sqlite")) as store:
            made = estimate(asked, questions, store)
        run = judge(server, tmp_path / "s.sqlite", questions=questions)
    assert (made.num_calls, made.num_repeats, made.num_stored) == (3, 1, 0) and len(server.chats) == 3
    assert "4 questions, 0 of them answered in the store, 1 the same as others: 3 calls" in made.text()
    assert {j.prompt_id: j.score for j in run.judgments}["p"] == 0.5


def test_without_a_price_the_estimate_has_no_dollars(tmp_path):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        config = judge_config(type("server", (), {"url": "http://x/v1"}))
        made = estimate(asking(config, price=None), questions_of(comparisons(1), "both", 0), store)
    assert made.usd_at_most is None and "no price known" in made.text()


# --- biased judges in the statistics ----------------------------------------------------------------------


def uneven(num: int, seed: int) -> list[Comparison]:
    """Two systems of equal merit; a is mostly the longer one."""
    rng = random.Random(seed)
    made = []
    for i in range(num):
        length_a, length_b = (max(1, round(rng.gauss(mean, 12))) for mean in (60, 50))
        post = f"post {i}"
        made.append(Comparison(prompt_id_of(post), post, "a", "a" * length_a, "b", "b" * length_b))
    return made


def likes_length(shown: Shown, count: int) -> str:
    """Prefers the longer one by a logistic in the difference, with luck that belongs to the pair, not to the slot."""
    a, b = (shown.a, shown.b) if shown.a[0] == "a" else (shown.b, shown.a)
    luck = random.Random(shown.material).random()
    a_wins = luck < 1 / (1 + np.exp(-(len(a) - len(b)) / 10))
    return "A" if a_wins == (shown.a[0] == "a") else "B"


def test_a_taste_for_length_shows_and_is_taken_out(tmp_path):
    with StubServer(likes_length) as server:
        run = judge(server, tmp_path / "s.sqlite", uneven(150, seed=1))
    judgments = run.judgments
    lengths = ([j.length_a for j in judgments], [j.length_b for j in judgments])
    scores = [j.score for j in judgments]
    raw, controlled = win_rate(scores), length_controlled_win_rate(scores, *lengths)
    assert raw.low > 0.5, "the longer system seems the better one"
    assert controlled.slope_low > 0 and controlled.low < 0.5 < controlled.high
    assert all(j.consistent for j in judgments)


def test_a_taste_for_the_first_slot_shows(tmp_path):
    with StubServer(first_slot_wins) as server:
        run = judge(server, tmp_path / "s.sqlite", comparisons(10))
    bias = position_bias([j.first_slot_wins for j in run.judgments])
    assert bias.first_share == 1.0 and bias.first_twice == 10 and bias.p_value < 0.01
    assert win_rate([j.score for j in run.judgments]).rate == 0.5


def test_a_judge_of_length_alone_gains_nothing_where_lengths_are_equal(tmp_path):
    equal = [
        Comparison(prompt_id_of(str(i)), f"post {i}", "x", f" {i:05d}", "y", f" {i:04d}a") for i in range(5)
    ]
    with StubServer(longer_wins) as server:
        run = judge(server, tmp_path / "s.sqlite", equal)
    assert run.rate == 0.5 and not any(j.consistent for j in run.judgments)
