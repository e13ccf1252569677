"""The Batch API on the same store: submit, poll, merge, submit what is missing, survive a kill at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from judge_runs import PRICE, judge, judge_by_batch, matchups
from stub_judge_server import (
    Reply,
    StubServer,
    at_first,
    chat_completion,
    error,
    first_slot_wins,
    longer_wins,
)

from eval.judging.openai.batch_api import BatchAPIConfig, BatchJudge
from eval.judging.openai.budget import BudgetConfig


@pytest.fixture
def store(tmp_path):
    return tmp_path / "s.sqlite"


def num_batches(server: StubServer) -> int:
    return len(server.batches)


def test_a_batch_gives_the_verdicts_of_live_calls_and_shares_their_store(store, tmp_path):
    with StubServer(longer_wins) as server:
        run = judge_by_batch(server, store)
        assert num_batches(server) == 1 and server.paths.count("POST /v1/chat/completions") == 0
        live = judge(server, tmp_path / "live.sqlite", matchups(4))
        assert sorted(map(str, run.judgments)) == sorted(map(str, live.judgments)) and run.rate == 0.0
        num_chats = len(server.chats)
        again = judge(server, store, matchups(5))
    assert len(server.chats) == num_chats + 2 and len(again.verdicts) == 10, "live asks only what is new"
    assert {call.backend for call in run.calls} == {"batch"}
    assert run.ledger.num_open == 0
    assert run.ledger.usd == pytest.approx(8 * (400 * PRICE.input + 30 * PRICE.output) / 1e6)
    keys = [json.loads(line)["custom_id"] for line in server.files["file-0"].splitlines()]
    assert sorted(keys) == sorted(call.key for call in run.calls)


def test_what_is_answered_already_is_not_submitted(store):
    with StubServer(longer_wins) as server:
        judge(server, store, matchups(3))
        judge_by_batch(server, store)
        assert [len(f.splitlines()) for f in server.files.values()] == [2, 2]  # input and output
        judge_by_batch(server, store)
    assert num_batches(server) == 1


def test_an_expired_batch_keeps_what_it_finished_and_the_rest_is_submitted_again(store):
    def plan(number, rows):
        return {"status": "expired", "answer": 3} if number == 0 else {}

    with StubServer(longer_wins, batch_plan=plan) as server:
        run = judge_by_batch(server, store)
    assert num_batches(server) == 2 and len(server.chats) == 8
    assert run.statuses() == {"ok": 8} and run.ledger.num_open == 0
    assert run.ledger.num_requests == 13, "three and five of the first, five of the second"


def test_what_never_comes_back_has_failed_after_some_submissions(store):
    with StubServer(longer_wins, batch_plan=lambda n, rows: {"status": "expired", "answer": 0}) as server:
        run = judge_by_batch(server, store, matchups(1))
        assert num_batches(server) == 3 and run.statuses() == {"failed": 2} and run.ledger.usd == 0.0
        server.batch_plan = None
        again = judge_by_batch(server, store, matchups(1))
    assert again.statuses() == {"ok": 2}


def test_a_batch_of_failures_has_no_output_file(store):
    """Rate limits and server errors inside a batch pass; its output file is then missing altogether."""
    with StubServer(at_first(error(500, "oops"), then=longer_wins)) as server:
        run = judge_by_batch(server, store)
    assert num_batches(server) == 2 and run.statuses() == {"ok": 8}
    assert server.batches["batch_0"]["final"]["output_file_id"] is None


def test_each_failure_in_a_batch_has_its_status(store):
    replies = {
        "rabbit000": error(400, "too long", "context_length_exceeded"),
        "rabbit001": error(400, "flagged", "content_filter"),
        "rabbit002": Reply(body=chat_completion("", finish_reason="length")),
        "rabbit003": Reply(body={"detail": "no completion"}),
    }

    def behave(shown, count):
        return next(reply for word, reply in replies.items() if word in shown.material)

    with StubServer(behave) as server:
        run = judge_by_batch(server, store)
    assert run.statuses() == {"failed": 4, "refused": 2, "truncated": 2}
    # the first batch has all eight; what is no completion is tried twice more, what is too long is not
    assert num_batches(server) == 3 and len(server.chats) == 8 + 2 + 2


def test_unreadable_answers_are_asked_again_in_the_next_batch(store):
    def behave(shown, count):
        return "A" if "in any other form" in shown.body["messages"][1]["content"] else "Hm."

    with StubServer(behave) as server:
        run = judge_by_batch(server, store, matchups(2))
    assert num_batches(server) == 2 and run.statuses() == {"ok": 4}
    assert all(len(v.keys) == 2 for v in run.verdicts)


def test_large_sets_go_in_several_batches(store):
    with StubServer(longer_wins) as server:
        run = judge_by_batch(server, store, config=BatchAPIConfig(poll_seconds=0.01, max_requests=3))
    assert num_batches(server) == 3 and run.statuses() == {"ok": 8}


def test_the_budget_covers_the_whole_batch_before_it_is_submitted(store):
    with StubServer(longer_wins) as server:
        run = judge_by_batch(server, store, budget=BudgetConfig(max_calls=7))
        assert "the next 8 requests would pass budget.max_calls=7" in str(run.stopped)
        assert num_batches(server) == 0 and server.files == {} and run.ledger.num_requests == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"status": "failed", "errors": {"data": [{"code": "token_limit_exceeded", "message": "queue"}]}},
            "was not accepted: token_limit_exceeded: queue",
        ),
        ({"status": "failed"}, "was not accepted: no reason given"),
    ],
)
def test_a_batch_that_is_not_accepted_stops_the_run_and_costs_nothing(store, plan, message):
    with StubServer(longer_wins, batch_plan=lambda number, rows: plan) as server:
        run = judge_by_batch(server, store)
        assert message in str(run.stopped) and run.ledger.usd == 0.0 and run.ledger.num_open == 0
        server.batch_plan = None
        assert judge_by_batch(server, store).statuses() == {"ok": 8}


def test_a_used_up_quota_inside_a_batch_stops_the_run_and_keeps_the_answers(store):
    def behave(shown, count):
        return error(429, "quota", "insufficient_quota") if "rabbit003" in shown.material else "A"

    with StubServer(behave) as server:
        run = judge_by_batch(server, store)
    assert "quota is used up" in str(run.stopped) and run.statuses() == {"ok": 6}


# --- kills and stops --------------------------------------------------------------------------------------


class Killed(BaseException):
    """As good as a kill: nothing of ours handles it."""


def kill_at(method: str, when: str) -> Callable[[BatchJudge], None]:
    """Let the process die before or after one step of submitting."""

    def prepare(judge: BatchJudge) -> None:
        real = getattr(judge, method)

        async def dying(*arguments):
            if when == "before":
                raise Killed
            await real(*arguments)
            raise Killed

        setattr(judge, method, dying)

    return prepare


@pytest.mark.parametrize(
    ("method", "when", "num_before"),
    [("_create", "before", 0), ("_create", "after", 1), ("_submit", "after", 1), ("_merge", "before", 1)],
)
def test_a_batch_is_found_again_after_a_kill(store, method, when, num_before):
    with StubServer(longer_wins) as server:
        with pytest.raises(Killed):
            judge_by_batch(server, store, prepare=kill_at(method, when))
        assert num_batches(server) == num_before
        run = judge_by_batch(server, store)
    assert num_batches(server) == 1 and len(server.chats) == 8, "nothing is paid twice"
    assert run.statuses() == {"ok": 8} and run.ledger.num_open == 0


def test_answers_of_an_earlier_batch_are_kept_whatever_is_asked_today(store):
    with StubServer(longer_wins) as server:
        with pytest.raises(Killed):
            judge_by_batch(server, store, matchups(4), prepare=kill_at("_submit", "after"))
        few = judge_by_batch(server, store, matchups(1))
        assert len(few.verdicts) == 2 and len(few.calls) == 8
        assert judge_by_batch(server, store, matchups(4)).statuses() == {"ok": 8}
    assert num_batches(server) == 1


def test_a_stop_leaves_the_batch_to_the_next_run(store):
    def stop_soon(judge: BatchJudge) -> None:
        asyncio.get_running_loop().call_later(0.3, judge.stop, "SIGINT")

    with StubServer(longer_wins, batch_plan=lambda number, rows: {"polls": 10**6}) as server:
        run = judge_by_batch(server, store, prepare=stop_soon)
        assert "SIGINT; submitted batches go on" in str(run.stopped) and run.verdicts == []
        assert run.ledger.num_open == 8
        server.batches["batch_0"]["polls"] = 1
        assert judge_by_batch(server, store).statuses() == {"ok": 8}
    assert num_batches(server) == 1


def test_an_unclear_failure_to_submit_makes_no_second_batch(store, monkeypatch):
    """The API accepted the batch, but its answer was lost."""
    lost = []

    def lose_the_answer(server):
        real = server.make_batch

        def make(request):
            batch = real(request)
            if not lost:
                lost.append(batch)
                raise ConnectionAbortedError  # the handler dies without an answer
            return batch

        server.make_batch = make

    with StubServer(first_slot_wins) as server:
        monkeypatch.setattr(server._server, "handle_error", lambda *_: None)
        lose_the_answer(server)
        run = judge_by_batch(server, store)
    assert len(lost) == 1 and num_batches(server) == 1 and run.statuses() == {"ok": 8}


ROUTES = [("POST", "files"), ("POST", "batches"), ("GET", "batches"), ("GET", "batches/"), ("GET", "content")]


def replace_answers(server: StubServer, monkeypatch, page: Reply, times: int) -> list[tuple[str, str]]:
    """Let a proxy put `page` where the first `times` answers of each route should be; what is asked is done."""
    handler = server._server.RequestHandlerClass
    real, replaced = handler._other, []

    def route(method: str, path: str) -> tuple[str, str]:
        last = path.rsplit("/", 1)[-1]
        name = "content" if last == "content" else "batches/" if "/batches/" in path else last
        return method, name

    def answer(self, path, content):
        reply = real(self, path, content)
        if replaced.count(route(self.command, path)) < times:
            replaced.append(route(self.command, path))
            return page
        return reply

    monkeypatch.setattr(handler, "_other", answer)
    return replaced


PAGES = {
    "page": Reply(200, "<html>Down for maintenance</html>", {"Content-Type": "text/html"}),
    "page that claims to be JSON": Reply(200, "<html>Down</html>", {"Content-Type": "application/json"}),
    "empty body": Reply(200, "", {"Content-Type": "application/json"}),
    "HTTP 204": Reply(204, ""),
    "deeply nested": Reply(200, "[" * 5000, {"Content-Type": "application/json"}),
    **{f"JSON {json.dumps(body)}": Reply(200, body) for body in (None, [], [3], 3, True, {}, {"data": [3]})},
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_page_in_place_of_an_answer_is_asked_again_and_nothing_is_paid_twice(store, monkeypatch, page):
    with StubServer(first_slot_wins) as server:
        replaced = replace_answers(server, monkeypatch, page, times=1)
        run = judge_by_batch(server, store)
    assert sorted(replaced) == sorted(ROUTES), "every kind of request met the page"
    assert num_batches(server) == 1 and run.statuses() == {"ok": 8} and run.stopped is None


def test_pages_only_stop_the_run_with_a_reason(store, monkeypatch):
    with StubServer(first_slot_wins) as server:
        replace_answers(server, monkeypatch, Reply(200, "<html>Down</html>"), times=100)
        run = judge_by_batch(server, store)
    assert "the Batch API: the answer is not that of the API: <html>Down" in str(run.stopped)


def test_limits_of_the_api():
    with pytest.raises(ValueError, match="^max_requests must be >= 1 and <= 50000, got 60000"):
        BatchAPIConfig(max_requests=60_000)
    with pytest.raises(ValueError, match="^poll_seconds must be > 0, got 0"):
        BatchAPIConfig(poll_seconds=0)
