"""The judge behind an API against a real server on a real socket: orders, forms, caching, pace, caps, parallel work."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from judge_runs import PRICE, judge, judge_config, matchups
from stub_judge_server import (
    Reply,
    StubServer,
    at_first,
    chat_completion,
    first_slot_wins,
    in_turn,
    longer_wins,
    more_of_the_post_wins,
    shown_in,
    verdict_text,
)

from drpo.config import ConfigError
from eval.judging.judges import JudgeConfig
from eval.judging.matchup import questions_of
from eval.judging.openai.budget import BudgetConfig
from eval.judging.openai.openai_judge import make_client
from eval.judging.openai.rate_limit import LimitsConfig
from eval.judging.openai.retry import RetryConfig


@pytest.fixture
def store(tmp_path):
    return tmp_path / "verdicts.sqlite"


# --- what it says -----------------------------------------------------------------------------------------


def test_a_judge_that_always_picks_the_first_slot_gives_half_and_no_consistency(store):
    with StubServer(first_slot_wins) as server:
        run = judge(server, store)
    assert len(run.judgments) == 6 and run.rate == 0.5
    assert [j.consistent for j in run.judgments] == [False] * 6
    assert [j.first_slot_wins for j in run.judgments] == [(1.0, 1.0)] * 6


def test_in_one_order_such_a_judge_seems_to_have_an_opinion(store):
    """Why both orders are the default."""
    with StubServer(first_slot_wins) as server:
        run = judge(server, store, questions=questions_of(matchups(), "both", 0)[::2])
    run.orders = "one"
    assert run.rate == 1.0 and [j.consistent for j in run.judgments] == [None] * 6


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("prompt", ["tldr-1", "hh_helpful-1", "hh_harmless-1"])
def test_the_order_is_undone(store, form, prompt):
    with StubServer(longer_wins) as server:
        run = judge(server, store, prompt=prompt, config=judge_config(server, form=form))
    assert run.rate == 0.0 and all(j.consistent for j in run.judgments)
    assert {v.winner for v in run.verdicts} == {"b"}
    assert all(("response_format" in chat.body) == (form == "json") for chat in server.chats)


def test_a_tie_counts_half_where_ties_are_allowed_and_is_unreadable_elsewhere(store, tmp_path):
    with StubServer(lambda shown, count: "tie") as server:
        allowed = judge(server, store)
        forbidden = judge(server, tmp_path / "other.sqlite", matchups(1), ties=False)
    assert allowed.rate == 0.5 and all(j.consistent for j in allowed.judgments)
    assert forbidden.statuses() == {"malformed": 2}
    assert forbidden.judgments[0].score is None


def test_each_call_is_recorded_with_tokens_cost_and_model(store):
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 50,
        "total_tokens": 1050,
        "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 100},
        "completion_tokens_details": {"reasoning_tokens": 20},
    }
    answer = json.dumps({"comparison": "x", "preferred": "A"})
    with StubServer(lambda shown, count: Reply(body=chat_completion(answer, usage=usage))) as server:
        run = judge(server, store, matchups(1))
    for call in run.calls:
        tokens = (call.prompt_tokens, call.cached_tokens, call.cache_write_tokens)
        assert tokens == (1000, 600, 100) and (call.completion_tokens, call.reasoning_tokens) == (50, 20)
        # 300 plain at $10 a million, 600 cached at $1, 100 written at $10, 50 answered at $100
        assert call.cost == pytest.approx(0.003 + 0.0006 + 0.001 + 0.005)
        assert call.model == "stub-judge" and call.model_returned == "stub-judge-2026-01-01"
        assert (call.fingerprint, call.request_id, call.num_attempts) == ("fp_1", "req_1", 1)
        assert json.loads(call.text)["preferred"] == "A" and call.latency > 0
        assert json.loads(call.request) in [chat.body for chat in server.chats]
    assert run.ledger.usd == pytest.approx(2 * 0.0096) and run.ledger.num_open == 0


# --- asking again -----------------------------------------------------------------------------------------


def test_an_unreadable_answer_is_asked_again_with_a_reminder(store):
    with StubServer(in_turn("Hm.", "B is nice", first_slot_wins)) as server:
        run = judge(server, store, questions=questions_of(matchups(1), "both", 0)[:1])
    assert [v.winner for v in run.verdicts] == ["a"] and len(run.verdicts[0].keys) == 3
    assert [call.status for call in run.calls] == ["malformed", "malformed", "ok"]
    texts = server.texts()
    assert "in any other form" not in texts[0] and "in any other form" in texts[1]
    assert len(set(texts)) == 3, "each asking has its own markers"


def test_a_judge_that_never_answers_readably_is_asked_three_times_and_decides_nothing(store):
    with StubServer(lambda shown, count: "I like both") as server:
        run = judge(server, store, matchups(2))
        again = judge(server, store, matchups(2))
    assert run.statuses() == {"malformed": 4} and len(server.chats) == 12
    assert all(j.score is None for j in run.judgments)
    assert sorted(map(str, again.verdicts)) == sorted(map(str, run.verdicts)), "paid for, so not asked again"


def test_a_rerun_asks_nothing(store):
    with StubServer(longer_wins) as server:
        first = judge(server, store)
        second = judge(server, store)
    assert len(server.chats) == 12
    assert sorted(map(str, second.verdicts)) == sorted(map(str, first.verdicts))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other-judge"},
        {"temperature": None},
        {"temperature": 1.0},
        {"max_output_tokens": 99},
        {"reasoning_effort": "low"},
        {"form": "text"},
        {"prompt": "hh_helpful-1"},
        {"ties": False},
    ],
    ids=str,
)
def test_whatever_could_change_an_answer_is_asked_anew(store, change):
    of_run = {name: change[name] for name in change if name in ("prompt", "ties")}
    of_config = {name: change[name] for name in change if name not in of_run}
    with StubServer(longer_wins, models={"stub-judge": None, "other-judge": None}) as server:
        judge(server, store, matchups(2))
        judge(server, store, matchups(2), config=judge_config(server, **of_config), **of_run)
        assert len(server.chats) == 8
        judge(server, store, matchups(2))  # and the first answers are still there
    assert len(server.chats) == 8


def test_another_server_is_another_judge(store):
    with StubServer(longer_wins) as server, StubServer(first_slot_wins) as other:
        judge(server, store)
        run = judge(other, store)
    assert len(other.chats) == 12 and run.rate == 0.5


def test_a_changed_response_is_asked_anew_and_the_others_are_not(store):
    before = matchups(3)
    after = [dataclasses.replace(before[0], response_a=" something else"), *before[1:]]
    with StubServer(longer_wins) as server:
        judge(server, store, before)
        judge(server, store, after)
    assert len(server.chats) == 6 + 2


def test_the_same_question_twice_is_asked_once(store):
    """Greedy decoding gives several seeds the same response; both wait for one call."""
    first = matchups(1)[0]
    seeds = [dataclasses.replace(first, seed=seed) for seed in range(4)]

    def slowly(shown, count):
        return Reply(body=chat_completion(verdict_text(shown.body, "A")), wait=0.05)

    with StubServer(slowly) as server:
        run = judge(server, store, seeds)
    assert len(server.chats) == 2 and len(run.verdicts) == 8


def test_a_stored_answer_is_read_by_todays_parser(store):
    """So a better parser costs nothing: what is stored is the answer as it came."""
    import sqlite3

    with StubServer(longer_wins) as server:
        judge(server, store)
        with sqlite3.connect(store) as db:
            db.execute("UPDATE calls SET status = 'malformed', slot = NULL")
        run = judge(server, store)
    assert run.statuses() == {"ok": 12} and len(server.chats) == 12


# --- budget -----------------------------------------------------------------------------------------------


def as_dear_as_can_be(shown, count):
    """As many tokens as bytes were sent, and the longest answer, after a while: what a reservation must foresee."""
    sent = sum(len(message["content"].encode()) for message in shown.body["messages"])
    usage = {
        "prompt_tokens": sent + 20,
        "completion_tokens": shown.body["max_completion_tokens"],
        "total_tokens": 0,
    }
    return Reply(body=chat_completion(verdict_text(shown.body, "A"), usage=usage), wait=0.02)


def paid(server) -> float:
    """Dollars by the server's own count."""
    usages = [chat.reply.body["usage"] for chat in server.chats if chat.answered]
    return sum(u["prompt_tokens"] * 10e-6 + u["completion_tokens"] * 100e-6 for u in usages)


def test_the_cap_in_dollars_is_not_passed_by_one_of_many_calls_at_once(store):
    cap = 0.3
    with StubServer(as_dear_as_can_be) as server:
        run = judge(
            server,
            store,
            matchups(20),
            budget=BudgetConfig(max_usd=cap),
            limits=LimitsConfig(concurrency=16),
        )
        dearest = max(c.cost for c in run.calls)
        assert paid(server) <= cap < paid(server) + 2 * dearest, "close to the cap, and not above"
        assert run.stopped is not None and "budget.max_usd=0.3" in str(run.stopped)
        assert run.ledger.usd == pytest.approx(paid(server)) and run.ledger.num_open == 0
        num_before = len(server.chats)
        assert 5 < num_before < 40 and len(run.verdicts) == num_before

        again = judge(server, store, matchups(20), budget=BudgetConfig(max_usd=cap))
        assert len(server.chats) == num_before, "the cap holds over runs"
        assert len(again.verdicts) == num_before, "what is paid is still to be had"
        more = judge(server, store, matchups(20), budget=BudgetConfig(max_usd=100.0))
    assert more.stopped is None and len(more.verdicts) == 40 == len(server.chats)


def test_a_call_that_alone_could_pass_the_cap_is_not_sent(store):
    with StubServer(longer_wins) as server:
        run = judge(server, store, budget=BudgetConfig(max_usd=0.001))
    assert server.chats == [] and run.verdicts == [] and run.ledger.num_requests == 0
    assert "could cost $0.0" in str(run.stopped)


def test_the_cap_in_calls_counts_retries(store):
    broken = Reply(500, {"error": {"message": "oops"}})
    with StubServer(at_first(broken, then=longer_wins)) as server:
        run = judge(
            server,
            store,
            matchups(10),
            budget=BudgetConfig(max_calls=13),
            limits=LimitsConfig(concurrency=8),
        )
        assert len(server.chats) == 13 == run.ledger.num_requests
        assert "budget.max_calls=13" in str(run.stopped)
        judge(server, store, matchups(10), budget=BudgetConfig(max_calls=13))
    assert len(server.chats) == 13


def test_a_request_that_may_have_been_paid_counts_against_the_cap(store):
    """Nobody knows whether a timed-out request was worked on, so its reservation stays spent."""
    impatient = RetryConfig(timeout=0.3, max_attempts=1)
    with StubServer(lambda shown, count: Reply(hang=True)) as server:
        questions = questions_of(matchups(1), "both", 0)[:1]
        run = judge(server, store, questions=questions, retry=impatient)
    assert run.statuses() == {"failed": 1} and run.calls[0].cost is None
    sent = sum(len(message["content"].encode()) for message in server.chats[0].body["messages"])
    at_least = PRICE.at_most(sent, 100)
    assert at_least < run.ledger.usd < 2 * at_least


# --- pace -------------------------------------------------------------------------------------------------


def test_no_more_requests_are_under_way_than_allowed(store):
    at_once, most = 0, 0

    def count_them(shown, count):
        nonlocal at_once, most
        with server.lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with server.lock:
            at_once -= 1
        return "A"

    with StubServer(count_them) as server:
        judge(server, store, limits=LimitsConfig(concurrency=3))
    assert most == 3


# --- keys -------------------------------------------------------------------------------------------------


def test_the_key_of_openai_is_sent_to_openai_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.invalid/v1")
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    openai = make_client(JudgeConfig(model="m"), RetryConfig())
    assert openai.api_key == "sk-secret" and str(openai.base_url) == "https://api.openai.com/v1/"
    assert openai.max_retries == 0
    local = JudgeConfig(model="m", base_url="http://localhost:1/v1")
    assert make_client(local, RetryConfig()).api_key == "none"
    named = dataclasses.replace(local, api_key_env="OTHER_KEY")
    assert make_client(named, RetryConfig()).api_key == "sk-other"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY .* is not set"):
        make_client(JudgeConfig(model="m"), RetryConfig())


def test_the_better_response_wins_whatever_its_length(store):
    with StubServer(more_of_the_post_wins) as server:
        run = judge(server, store)
        assert shown_in(server.chats[0].body).material.startswith("POST: my rabbit")
    assert run.rate == 1.0
