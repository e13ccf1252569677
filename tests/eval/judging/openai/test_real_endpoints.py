"""Behaviour of real endpoints, against a server on a real socket: live, by batch, and in the preflight checks."""

from __future__ import annotations

import json

import pytest
from judge_runs import PATIENT, judge, judge_by_batch, judge_config, matchups
from preflight_runs import check, probe
from stub_judge_server import (
    MODEL,
    Reply,
    StubServer,
    at_first,
    chat_completion,
    error,
    in_turn,
    longer_wins,
    verdict_text,
)

from eval.judging.judge import JudgeStopped
from eval.judging.matchup import questions_of
from eval.judging.openai.rate_limit import LimitsConfig
from eval.judging.openai.retry import RetryConfig

ONE_WORKER = LimitsConfig(concurrency=1)
FLAGGED = Reply(
    403,
    {
        "error": {
            "code": 403,
            "message": "Input flagged",
            "metadata": {"reasons": ["violence"], "flagged_input": "x"},
        }
    },
)
UNCLEAR = Reply(403, "<html>Sorry, you have been blocked</html>")
CREDIT = {"message": "Your credit balance is too low to access the API.", "type": "invalid_request_error"}
BROKE = {
    "402": error(402, "Insufficient Balance", "invalid_request_error"),
    "400": Reply(400, {"type": "error", "error": CREDIT}),
    "403, a text for an error": Reply(
        403, {"code": "permission-denied", "error": "used all available credits"}
    ),
    "429, JSON that is a text": Reply(429, '"You have used all available credits"'),
    "429 in a list": Reply(429, [{"error": {"code": 429, "message": "Your credits are depleted."}}]),
    "412": error(
        412, "Account a is suspended, possibly due to reaching the spending limit", "PRECONDITION_FAILED"
    ),
    "200": Reply(200, {"error": {"code": 402, "message": "Insufficient credits"}}),
    "200 without a code": Reply(
        200, {"choices": None, "base_resp": {"status_code": 1, "status_msg": "insufficient balance"}}
    ),
    "429 with x-should-retry": error(
        429, "quota", "insufficient_quota", x_should_retry="true", Retry_After="1"
    ),
}


@pytest.fixture
def store(tmp_path):
    return tmp_path / "verdicts.sqlite"


def only(word: str, reply: Reply):
    """Return a judge that gives `reply` to questions with this word, and verdicts to the others."""
    return lambda shown, count: reply if word in shown.material else longer_wins(shown, count)


# --- refused ----------------------------------------------------------------------------------------------


def test_flagged_prompt_is_refused_and_others_judged(store):
    with StubServer(only("rabbit001", FLAGGED)) as server:
        run = judge(server, store, matchups(4))
        assert run.stopped is None and run.statuses() == {"ok": 6, "refused": 2}
        assert {v.detail for v in run.verdicts if v.status == "refused"} == {
            "HTTP 403: Input flagged (violence)"
        }
        again = judge(server, store, matchups(4))
    assert len(server.chats) == 8 and again.statuses() == run.statuses(), "a rerun asks nothing"
    paid = [call.cost for call in run.calls if call.cost is not None]
    assert run.ledger.usd == pytest.approx(sum(paid)) and len(paid) == 6


def test_unclear_403_after_answers_fails_one_question(store):
    with StubServer(only("rabbit003", UNCLEAR)) as server:
        run = judge(server, store, matchups(4), limits=ONE_WORKER)
        assert run.stopped is None and run.statuses() == {"ok": 6, "failed": 2} and len(server.chats) == 8
        assert "you have been blocked" in next(v.detail for v in run.verdicts if v.status == "failed")
        server.behaviour = longer_wins
        again = judge(server, store, matchups(4))
    assert again.statuses() == {"ok": 8} and len(server.chats) == 10


def test_unclear_403_before_any_answer_stops_the_run(store):
    with StubServer(lambda shown, count: UNCLEAR) as server:
        run = judge(server, store, matchups(20), limits=ONE_WORKER)
        assert len(server.chats) == 1 and run.verdicts == [] and run.ledger.usd == 0.0
        assert "because of the key, the place or the text (HTTP 403: <html>Sorry" in str(run.stopped)
        server.behaviour = longer_wins
        assert judge(server, store, matchups(20)).statuses() == {"ok": 40}


def test_unclear_403s_in_a_row_stop_the_run(store):
    patience = RetryConfig(max_failures_in_a_row=3)
    with StubServer(in_turn(longer_wins, UNCLEAR)) as server:
        run = judge(server, store, matchups(20), limits=ONE_WORKER, retry=patience)
    assert len(server.chats) == 4 and "3 questions in a row got no answer: HTTP 403" in str(run.stopped)


def test_finish_reasons_of_other_providers_are_known(store):
    reasons = {
        "rabbit000": "SAFETY",
        "rabbit001": "content_filter: PROHIBITED_CONTENT",
        "rabbit002": "MAX_TOKENS",
    }

    def behave(shown, count):
        reason = next(reason for word, reason in reasons.items() if word in shown.material)
        return Reply(body=chat_completion(verdict_text(shown.body, "A"), finish_reason=reason))

    with StubServer(behave) as server:
        run = judge(server, store, matchups(3))
    assert run.statuses() == {"refused": 4, "truncated": 2} and len(server.chats) == 6
    assert "stopped by the content filter (SAFETY)" in {v.detail for v in run.verdicts}


# --- money ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", BROKE.values(), ids=BROKE)
def test_exhausted_credit_stops_the_run_and_loses_nothing(store, reply):
    with StubServer(in_turn(longer_wins, longer_wins, reply)) as server:
        run = judge(server, store, matchups(5), limits=ONE_WORKER)
        assert "money or quota is used up" in str(run.stopped)
        assert len(server.chats) == 3 and run.statuses() == {"ok": 2} and run.ledger.num_open == 0
        assert {call.status for call in run.calls} == {"ok"}, "it is no answer, and no failure of a question"
        server.behaviour = longer_wins
        rest = judge(server, store, matchups(5))
    assert rest.statuses() == {"ok": 10} and len(server.chats) == 11


def test_daily_limit_beyond_max_elapsed_stops_the_run(store):
    limit = error(429, "Rate limit of 50 per 86400s exceeded for UserByModelByDay", Retry_After="39404")
    with StubServer(in_turn(longer_wins, limit)) as server:
        run = judge(server, store, matchups(20), limits=ONE_WORKER)
    assert len(server.chats) == 2 and "UserByModelByDay" in str(run.stopped)


# --- answers ----------------------------------------------------------------------------------------------


def in_parts(shown, text):
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Preferred: A"}]}
    return chat_completion([thought, {"type": "text", "text": text}])


def after_an_orphan_tag(shown, text):
    return chat_completion(f'Preferred: A\n{{"preferred": "A"}}\n</think>\n\n{text}')


def as_a_stream(shown, text):
    deltas = [{"content": text[:5]}, {"content": text[5:]}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def as_text(shown, text):
    return "\n \n" + json.dumps(chat_completion(text))


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("shape", [in_parts, after_an_orphan_tag, as_a_stream, as_text])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "text/event-stream"])
def test_paid_verdict_is_read_in_every_body_format(store, form, shape, kind):
    def behave(shown, count):
        body = shape(shown, verdict_text(shown.body, longer_wins(shown, count)))
        return Reply(200, body, {"Content-Type": kind})

    with StubServer(behave) as server:
        run = judge(server, store, matchups(2), config=judge_config(server, form=form))
    assert run.statuses() == {"ok": 4} and run.rate == 0.0 and len(server.chats) == 4


def test_interrupted_answer_is_retried(store):
    half = Reply(body=chat_completion('{"preferred"', finish_reason="error"))
    with StubServer(at_first(half, then=longer_wins)) as server:
        run = judge(server, store, matchups(1))
    assert run.statuses() == {"ok": 2} and len(server.chats) == 4


@pytest.mark.parametrize(
    "usage", [{"total_tokens": 430}, {"prompt_tokens": "400", "completion_tokens": "30"}, "none"]
)
def test_unreadable_usage_is_charged_at_the_bound(store, usage):
    """It must not be free: the cap would not hold."""
    body = {**chat_completion(json.dumps({"comparison": "", "preferred": "B"})), "usage": usage}
    with StubServer(lambda shown, count: Reply(body=body)) as server:
        run = judge(server, store, questions=questions_of(matchups(1), "both", 0)[:1])
    assert run.calls[0].cost is None and run.ledger.usd > 100 * 100e-6


# --- by batch ---------------------------------------------------------------------------------------------


def test_batch_with_flagged_and_unclear_rows_keeps_the_rest(store):
    replies = {"rabbit000": FLAGGED, "rabbit001": Reply(403, {"error": None})}

    def behave(shown, count):
        return next((reply for word, reply in replies.items() if word in shown.material), "A")

    with StubServer(behave) as server:
        run = judge_by_batch(server, store)
        assert run.stopped is None and run.statuses() == {"ok": 4, "refused": 2, "failed": 2}
        judge_by_batch(server, store)
    assert len(server.chats) == 8 + 2, "only what failed is submitted by a rerun"


def test_batch_of_unclear_refusals_stops_the_run(store):
    with StubServer(lambda shown, count: Reply(403, {"error": None})) as server:
        run = judge_by_batch(server, store)
        assert "the key, the place or the text" in str(run.stopped) and len(server.batches) == 1
        server.behaviour = longer_wins
        assert judge_by_batch(server, store).statuses() == {"ok": 8}


@pytest.mark.parametrize("name", ["402", "400", "200", "403, a text for an error"])
def test_exhausted_credit_in_a_batch_keeps_the_answers(store, name):
    with StubServer(only("rabbit003", BROKE[name])) as server:
        run = judge_by_batch(server, store)
        assert "money or quota is used up" in str(run.stopped) and run.statuses() == {"ok": 6}
        server.behaviour = longer_wins
        assert judge_by_batch(server, store).statuses() == {"ok": 8}
    assert len(server.chats) == 10


def test_batch_answers_in_parts_are_read(store):
    def behave(shown, count):
        return Reply(body=in_parts(shown, verdict_text(shown.body, longer_wins(shown, count))))

    with StubServer(behave) as server:
        assert judge_by_batch(server, store).rate == 0.0


# --- before the first question ----------------------------------------------------------------------------


LOOK_UP = f"/v1/models/{MODEL}"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (BROKE["402"], "money or quota is used up"),
        (BROKE["400"], "money or quota is used up"),
        (
            error(403, "Country not supported", "unsupported_country_region_territory"),
            "account or from this location",
        ),
        (error(429, "You exceeded your limit, requests per day"), "quota of the day"),
    ],
)
def test_look_up_reports_fatal_errors_before_any_question(reply, message):
    with StubServer(replies={LOOK_UP: reply}) as server, pytest.raises(JudgeStopped, match=message):
        check(server)


@pytest.mark.parametrize(
    "reply",
    [
        error(403, "You have insufficient permissions. Missing scopes: api.model.read"),
        UNCLEAR,
        error(503, "busy"),
    ],
)
def test_key_without_look_up_permission_is_only_reported(reply):
    with StubServer(replies={LOOK_UP: reply}) as server:
        (said,) = check(server)
        assert said.startswith("could not look up stub-judge: ") and server.chats == []


def test_html_page_instead_of_models_is_only_reported():
    page = Reply(200, "<html>Hello</html>")
    with StubServer(models={}, replies={"/v1/models": page}) as server:
        (said,) = check(server)
    assert "does not tell which models it has" in said


@pytest.mark.parametrize("reply", [BROKE["402"], BROKE["200"], error(403, "no access to model m"), UNCLEAR])
def test_probe_reports_the_cause_and_asks_nothing_else(store, reply):
    with StubServer(lambda shown, count: reply) as server:
        with pytest.raises(JudgeStopped, match="used up|API key may not|the key, the place or the text"):
            probe(server, store, judge_config(server, form="auto"), PATIENT)
    assert len(server.chats) == 1
