"""What can go wrong between us and a judge, on a real socket: each failure has its own status and none is a verdict."""

from __future__ import annotations

import email.utils
import json
import time

import pytest
from judge_runs import judge, judge_config, matchups
from stub_judge_server import (
    Reply,
    StubServer,
    at_first,
    chat_completion,
    error,
    in_turn,
    longer_wins,
    verdict_text,
)

from eval.judging.matchup import questions_of
from eval.judging.openai.rate_limit import LimitsConfig
from eval.judging.openai.retry import RetryConfig

HTML = "<html><body>502 Bad Gateway</body></html>"
ONE_WORKER = LimitsConfig(concurrency=1)
HASTY = RetryConfig(timeout=20.0, max_attempts=2, base_delay=0.0, max_delay=0.0, max_failures_in_a_row=1000)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "verdicts.sqlite"


# --- what passes ------------------------------------------------------------------------------------------


PASSING = {
    "429": error(429, "Rate limit reached", "rate_limit_exceeded"),
    "429 with Retry-After": error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After="0.2"),
    "500": error(500, "The server had an error"),
    "503": error(503, "Overloaded"),
    "409": error(409, "Conflict"),
    "HTML with 200": Reply(200, HTML),
    "HTML with 200 that claims to be JSON": Reply(200, HTML, {"Content-Type": "application/json"}),
    "an error with 200": Reply(200, {"error": {"message": "upstream failed", "code": 502}}),
    "half of a JSON with 200": Reply(200, '{"choices": [', {"Content-Type": "application/json"}),
    "dropped connection": Reply(drop=True),
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again(store, reply):
    with StubServer(at_first(reply, then=longer_wins)) as server:
        run = judge(server, store, matchups(2))
    assert run.stopped is None and run.statuses() == {"ok": 4} and run.rate == 0.0
    assert len(server.chats) == 8 and run.ledger.num_requests == 8
    assert {call.num_attempts for call in run.calls} == {2}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_what_does_not_pass_has_failed_and_is_asked_again_by_a_rerun(store, reply):
    with StubServer(lambda shown, count: reply) as server:
        run = judge(server, store, matchups(2), retry=HASTY)
        assert run.statuses() == {"failed": 4} and len(server.chats) == 8
        assert all(v.winner is None and v.detail for v in run.verdicts)
        assert [j.score for j in run.judgments] == [None, None]
        server.behaviour = longer_wins
        again = judge(server, store, matchups(2))
    assert again.statuses() == {"ok": 4} and len(server.chats) == 12


def in_two_seconds(shown, count):
    """Retry-After as a date: dates have no fractions, so it is one to two seconds from now."""
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    return error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After=date)


@pytest.mark.parametrize(
    ("limited", "at_least"),
    [
        (error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After="0.4"), 0.4),
        (in_two_seconds, 0.9),
    ],
    ids=["seconds", "date"],
)
def test_retry_after_is_heeded(store, limited, at_least):
    """Lower bounds on time, which no slow machine can miss."""
    with StubServer(in_turn(limited, longer_wins)) as server:
        judge(server, store, questions=questions_of(matchups(1), "both", 0)[:1], limits=ONE_WORKER)
    first, second = server.chats
    assert second.start - first.start >= at_least


def test_one_retry_after_holds_everybody_back(store):
    """Requests that fail count against the limit too, so all workers wait."""
    limited = error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After="0.5")

    def slowly(shown, count):
        return Reply(body=chat_completion(verdict_text(shown.body, "A")), wait=0.1)

    with StubServer(in_turn(limited, slowly)) as server:
        judge(server, store, matchups(2), limits=LimitsConfig(concurrency=2))
    times = [chat.start for chat in server.chats]
    assert len([t for t in times if t - times[0] < 0.5]) == 2, "only what was under way already"


def test_a_retry_after_beyond_patience_is_not_waited_for(store):
    patience = RetryConfig(max_elapsed=5.0, max_failures_in_a_row=1)
    limited = error(429, "Rate limit reached", "rate_limit_exceeded", Retry_After="300")
    with StubServer(lambda shown, count: limited) as server:
        run = judge(server, store, retry=patience, limits=ONE_WORKER)
    assert len(server.chats) == 1 and run.statuses() == {"failed": 1}
    assert "1 questions in a row got no answer" in str(run.stopped)


def test_a_timeout_is_tried_again(store):
    impatient = RetryConfig(timeout=0.5, max_attempts=3, base_delay=0.01)
    with StubServer(at_first(Reply(hang=True), then=longer_wins)) as server:
        run = judge(server, store, matchups(1), retry=impatient)
    assert run.statuses() == {"ok": 2} and len(server.chats) == 4


def test_nobody_listening_is_a_failure_that_costs_nothing(store):
    with StubServer() as server:
        gone = judge_config(server)
    run = judge(server, store, matchups(1), config=gone, retry=HASTY)
    assert run.statuses() == {"failed": 2} and run.ledger.usd == 0.0
    assert "connection failed" in run.verdicts[0].detail


def test_a_judge_that_is_down_stops_the_run(store):
    patience = RetryConfig(max_attempts=1, max_failures_in_a_row=5)
    with StubServer(lambda shown, count: error(500, "down")) as server:
        run = judge(server, store, matchups(50), retry=patience, limits=ONE_WORKER)
    assert len(server.chats) == 5 and "5 questions in a row got no answer: HTTP 500: " in str(run.stopped)


def test_failures_with_answers_between_them_do_not_stop_the_run(store):
    patience = RetryConfig(max_attempts=1, max_failures_in_a_row=2)
    down = error(500, "down")
    with StubServer(in_turn(*[down, longer_wins] * 6, longer_wins)) as server:
        run = judge(server, store, retry=patience, limits=ONE_WORKER)
    assert run.stopped is None and run.statuses() == {"failed": 6, "ok": 6}


# --- what does not pass -----------------------------------------------------------------------------------


STOPPING = {
    "quota": (error(429, "You exceeded your current quota", "insufficient_quota"), "quota is used up"),
    "wrong key": (error(401, "Incorrect API key provided", "invalid_api_key"), "key is not accepted"),
    "forbidden": (error(403, "Country not supported"), "key may not do this"),
    "unknown model": (error(404, "The model does not exist", "model_not_found"), "no such model"),
    "unsupported setting": (
        error(400, "Unsupported value: 'temperature'", "unsupported_value", "temperature"),
        "does not take a setting",
    ),
    "unsupported setting without a code": (
        error(400, "Unsupported parameter: 'temperature'", None, "temperature"),
        "does not take a setting",
    ),
}


@pytest.mark.parametrize(("reply", "message"), STOPPING.values(), ids=STOPPING)
def test_what_concerns_every_question_stops_the_run_at_once_and_keeps_what_is_there(store, reply, message):
    with StubServer(in_turn(*[longer_wins] * 5, reply)) as server:
        run = judge(server, store, matchups(20), limits=ONE_WORKER)
        assert message in str(run.stopped)
        assert len(server.chats) == 6 and run.statuses() == {"ok": 5}
        server.behaviour = longer_wins
        rest = judge(server, store, matchups(20))
    assert rest.stopped is None and len(rest.verdicts) == 40
    assert len(server.answered_texts()) == 40 == len(set(server.answered_texts()))


def test_what_is_under_way_when_the_run_stops_is_kept(store):
    """They are paid for: the stop waits for them."""

    def slowly(shown, count):
        return Reply(body=chat_completion(verdict_text(shown.body, "A")), wait=0.3)

    quota = error(429, "You exceeded your current quota", "insufficient_quota")
    with StubServer(in_turn(slowly, slowly, slowly, quota)) as server:
        run = judge(server, store, matchups(20), limits=LimitsConfig(concurrency=4))
    assert "quota" in str(run.stopped)
    assert len(server.chats) == 4 and run.statuses() == {"ok": 3}
    assert run.ledger.num_open == 0


def test_what_was_not_sent_yet_when_the_run_stops_is_not_counted(store):
    quota = error(429, "You exceeded your current quota", "insufficient_quota")
    with StubServer(lambda shown, count: quota) as server:
        run = judge(server, store, limits=LimitsConfig(concurrency=3, requests_per_minute=1))
    assert "quota" in str(run.stopped) and len(server.chats) == 1
    assert run.ledger.num_requests == 1 and run.ledger.num_open == 0


def test_a_real_wrong_key(store):
    with StubServer(longer_wins) as server:
        run = judge(server, store, key="sk-other")
    assert "the API key is not accepted" in str(run.stopped) and server.chats == []


def test_what_concerns_one_question_fails_that_one(store):
    """A post too long for the model: the others are judged."""
    too_long = error(400, "maximum context length is 8192 tokens", "context_length_exceeded", "messages")

    def behave(shown, count):
        return too_long if "rabbit001" in shown.material else longer_wins(shown, count)

    with StubServer(behave) as server:
        run = judge(server, store, matchups(3))
    assert run.statuses() == {"ok": 4, "failed": 2} and len(server.chats) == 6, "it is not tried again"
    failed = [v for v in run.verdicts if v.status == "failed"]
    assert all("context_length_exceeded" in v.detail for v in failed)
    assert run.stopped is None


# --- answers that are none --------------------------------------------------------------------------------


NO_VERDICTS = {
    "empty choices": (Reply(body={**chat_completion("x"), "choices": []}), "malformed", 3),
    "no content": (Reply(body=chat_completion(None)), "malformed", 3),
    "refusal field": (Reply(body=chat_completion(None, refusal="I will not judge this.")), "refused", 1),
    "refusal in the text": ("I'm sorry, but I can't help with that.", "refused", 1),
    "content filter": (Reply(body=chat_completion("", finish_reason="content_filter")), "refused", 1),
    "filtered prompt": (error(400, "flagged", "content_filter"), "refused", 1),
    "cut answer": (Reply(body=chat_completion("Comparison: well", finish_reason="length")), "truncated", 1),
    "cut after a verdict": (
        Reply(body=chat_completion(json.dumps({"comparison": "", "preferred": "A"}), finish_reason="length")),
        "truncated",
        1,
    ),
    "something else": ("The first one.", "malformed", 3),
}


@pytest.mark.parametrize(("reply", "status", "num_asked"), NO_VERDICTS.values(), ids=NO_VERDICTS)
def test_an_answer_without_a_verdict_has_its_status_and_no_winner(store, reply, status, num_asked):
    with StubServer(lambda shown, count: reply) as server:
        run = judge(server, store, matchups(1))
        assert run.statuses() == {status: 2} and len(server.chats) == 2 * num_asked
        assert all(v.winner is None for v in run.verdicts) and run.judgments[0].score is None
        judge(server, store, matchups(1))
    assert len(server.chats) == 2 * num_asked, "it is an answer, and it was paid for"


def test_one_order_without_a_verdict_leaves_the_comparison_undecided(store):
    """Never imputed from the other order, which would be the slot's vote."""

    def refuses_the_second(shown, count):
        good_first = shown.a.startswith("rabbit")
        return "A" if good_first else Reply(body=chat_completion(None, refusal="no"))

    with StubServer(refuses_the_second) as server:
        run = judge(server, store, matchups(3))
    assert run.statuses() == {"ok": 3, "refused": 3}
    assert [j.score for j in run.judgments] == [None] * 3
    assert [j.statuses for j in run.judgments] == [("ok", "refused")] * 3


def test_half_a_character_in_an_answer_is_kept_as_a_replacement(store):
    answer = '{"choices": [{"message": {"content": "\\ud83d Preferred: A"}, "finish_reason": "stop"}]}'
    reply = Reply(200, answer, {"Content-Type": "application/json"})
    with StubServer(lambda shown, count: reply) as server:
        run = judge(server, store, matchups(1))
    assert run.statuses() == {"malformed": 2} and run.calls[0].text == "\ufffd Preferred: A"


def test_a_server_that_counts_no_tokens_is_booked_at_the_bound(store):
    """Local servers may send no usage; with a price the cap must hold all the same."""
    body = {**chat_completion(json.dumps({"comparison": "", "preferred": "B"})), "usage": None}
    with StubServer(lambda shown, count: Reply(body=body)) as server:
        run = judge(server, store, matchups(1))
        free = judge(server, store.with_suffix(".free"), matchups(1), price=None)
    assert run.calls[0].cost is None and run.ledger.usd > 2 * 100 * 100e-6
    assert free.ledger.usd == 0.0 and free.statuses() == {"ok": 2}
