"""Odd but harmless replies of servers: read where they hold an answer, else asked again; never an exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from judge_runs import PRICE, judge, judge_by_batch, matchups
from stub_judge_server import Reply, StubServer, at_first, chat_completion, in_turn, longer_wins, verdict_text

from eval.judging.openai.answer import Answer
from eval.judging.openai.pairwise import PROMPTS

JSON = {"Content-Type": "application/json"}
NESTED = "[" * 5000
CUTS = "\u2028\u2029\x85"
HALF = "\ud83d"


@pytest.fixture
def store(tmp_path):
    return tmp_path / "s.sqlite"


def changed(**changes: Any):
    """A judge whose completions have other top-level fields."""

    def behave(shown, count):
        return Reply(body={**chat_completion(verdict_text(shown.body, "A")), **changes})

    return behave


def with_choice(**changes: Any):
    def behave(shown, count):
        body = chat_completion(verdict_text(shown.body, "A"))
        return Reply(body={**body, "choices": [{**body["choices"][0], **changes}]})

    return behave


def without(name: str):
    def behave(shown, count):
        body = chat_completion(verdict_text(shown.body, "A"))
        return Reply(body={key: value for key, value in body.items() if key != name})

    return behave


def very_long(shown, count):
    return json.dumps({"comparison": "Better. " * 200_000, "preferred": "A"})


def raw_unicode_line_ends(shown, count):
    return json.dumps({"comparison": CUTS.join("abc"), "preferred": "A"}, ensure_ascii=False)


READ = {
    "no usage": without("usage"),
    "usage null": changed(usage=None),
    "usage list": changed(usage=[400, 30]),
    "usage with nulls": changed(usage={"prompt_tokens": None, "completion_tokens": None}),
    "usage with text": changed(usage={"prompt_tokens": "400", "completion_tokens": "30"}),
    "usage with huge counts": changed(usage={"prompt_tokens": 10**30, "completion_tokens": 10**30}),
    "usage with bools": changed(usage={"prompt_tokens": True, "completion_tokens": True}),
    "model is an object": changed(model={"id": "m"}),
    "model is half a character": changed(model=HALF),
    "fingerprint is a list": changed(system_fingerprint=["fp"]),
    "only choices": lambda shown, count: Reply(
        body={"choices": [{"message": {"content": verdict_text(shown.body, "A")}}]}
    ),
    "unknown finish_reason": with_choice(finish_reason="because"),
    "finish_reason is half a character": with_choice(finish_reason=HALF),
    "finish_reason is an object": with_choice(finish_reason={"type": "stop"}),
    "index is text": with_choice(index="first", logprobs=[3]),
    "very long text": very_long,
    "raw U+2028, U+2029, U+0085": raw_unicode_line_ends,
}
"Replies that hold an answer."


@pytest.mark.parametrize("behaviour", READ.values(), ids=READ)
def test_odd_answer_is_read_live(store, behaviour):
    with StubServer(behaviour) as server:
        run = judge(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.chats) == 2
    assert run.ledger.num_open == 0 and run.ledger.usd > 0


@pytest.mark.parametrize("behaviour", READ.values(), ids=READ)
def test_odd_answer_is_read_from_a_batch(store, behaviour):
    with StubServer(behaviour) as server:
        run = judge_by_batch(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.chats) == 2
    assert len(server.batches) == 1 and run.ledger.num_open == 0 and run.ledger.usd > 0


NO_ANSWER = {
    "empty body": Reply(200, ""),
    "empty body that claims to be JSON": Reply(200, "", JSON),
    "HTTP 204": Reply(204, ""),
    "JSON list": Reply(200, []),
    "JSON null": Reply(200, None),
    "JSON number": Reply(200, 3),
    "JSON text": Reply(200, '"A"', JSON),
    "JSON true": Reply(200, True),
    "empty object": Reply(200, {}),
    "deeply nested": Reply(200, NESTED, JSON),
    "choices are text": Reply(200, {"choices": "A"}),
    "message is text": Reply(200, {"choices": [{"message": "A"}]}),
    "content is a number": Reply(200, {"choices": [{"message": {"content": 3}}]}),
    "event of an odd shape": Reply(200, 'data: {"choices":["B"]}\n\n', {"Content-Type": "text/event-stream"}),
    "delta is text": Reply(200, 'data: {"choices":[{"delta":"B"}]}\n\n'),
    "not gzip": Reply(200, "plain", {"Content-Encoding": "gzip"}),
    "nested error page": Reply(500, NESTED, JSON),
    "error with half a character": Reply(500, {"error": {"message": HALF, "code": HALF}}),
    "odd Retry-After": Reply(500, "", {"Retry-After": "Mon, 99 Jan 99999 99:99:99 GMT"}),
}
"Replies that hold none."


@pytest.mark.parametrize("reply", NO_ANSWER.values(), ids=NO_ANSWER)
def test_reply_without_an_answer_is_asked_again_live(store, reply):
    with StubServer(at_first(reply, then=longer_wins)) as server:
        run = judge(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.chats) == 4
    assert {call.num_attempts for call in run.calls} == {2} and run.ledger.num_open == 0


@pytest.mark.parametrize("reply", NO_ANSWER.values(), ids=NO_ANSWER)
def test_reply_without_an_answer_is_asked_again_by_batch(store, reply):
    with StubServer(at_first(reply, then=longer_wins)) as server:
        run = judge_by_batch(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.chats) == 4
    assert len(server.batches) == 2 and run.ledger.num_open == 0


@pytest.mark.parametrize("ask", [judge, judge_by_batch])
def test_answer_without_choices_is_asked_again(store, ask):
    empty = Reply(body={**chat_completion(None), "choices": []})
    with StubServer(in_turn(empty, empty, longer_wins)) as server:
        run = ask(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.chats) == 4


@pytest.mark.parametrize("form", ["json", "text"])
def test_deeply_nested_answer_is_malformed(form):
    for text in (NESTED, '{"a":' * 5000, f"```json\n{NESTED}\n```"):
        parsed = PROMPTS["tldr-1"].parse(Answer(text), form, True)
        assert (parsed.status, parsed.slot) == ("malformed", None)


def test_long_runs_of_whitespace_are_read_in_linear_time():
    """In quadratic time this would take hours."""
    gap = "\n" * 300_000
    prompt = PROMPTS["tldr-1"]
    for text, form, slot in (
        (f"x{gap}y", "text", None),
        (f"x{gap}{prompt.label}: A{gap}<|end|>{gap}", "text", "first"),
        (f'{{"comparison": "",{gap}"preferred": "B"}}', "json", "second"),
        (f'```json{gap}{{"preferred": "A"}}{gap}```', "json", "first"),
        (f"```json{gap}x", "json", None),
    ):
        parsed = prompt.parse(Answer(text), form, True)
        assert (parsed.status, parsed.slot) == ("ok" if slot else "malformed", slot)


def test_cached_tokens_beyond_the_prompt_cost_no_negative_amount(store):
    """Some gateways do not count cached tokens in prompt_tokens."""
    usage = {
        "prompt_tokens": 50,
        "completion_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 3000},
    }
    with StubServer(changed(usage=usage)) as server:
        run = judge(server, store, matchups(1))
    assert run.ledger.usd == pytest.approx(2 * (3000 * PRICE.cached + 30 * PRICE.output) / 1e6)


# --- files of batches -------------------------------------------------------------------------------------


def change_answer_files(server: StubServer, change) -> None:
    """Apply `change` to each answer file before it is kept."""
    real = server.keep_file
    server.keep_file = lambda content: real(change(content) if '"response"' in content[:200] else content)


def change_first_rows(server: StubServer, **fields: Any) -> None:
    """Replace fields of the rows of the first answer file, response.* inside the response."""
    seen = []

    def change(content: str) -> str:
        seen.append(content)
        rows = [json.loads(line) for line in content.split("\n")]
        for row in rows if len(seen) == 1 else []:
            for name, value in fields.items():
                outer, _, inner = name.partition("__")
                (row[outer] if inner else row)[inner or outer] = value
        return "\n".join(map(json.dumps, rows))

    change_answer_files(server, change)


@pytest.mark.parametrize(
    "fields",
    [
        {"response__status_code": "200"},
        {"response__status_code": None},
        {"response__status_code": 201},
        {"response__request_id": {"id": 3}},
        {"response__request_id": HALF},
        {"error": {}},
        {"id": [3]},
    ],
    ids=str,
)
def test_odd_row_of_a_batch_is_read(store, fields):
    with StubServer(longer_wins) as server:
        change_first_rows(server, **fields)
        run = judge_by_batch(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.batches) == 1


@pytest.mark.parametrize(
    "fields",
    [
        *({"response": odd} for odd in (None, [], "text", 3, {})),
        *({"response__body": odd} for odd in (None, [], "text", 3, {}, {"choices": [{"message": HALF}]})),
        {"response__status_code": "500"},
        {"response__status_code": None, "response__body": {"error": {"message": HALF}}},
        {"response": None, "error": {"code": HALF, "message": [HALF]}},
        {"response": None, "error": "expired"},
    ],
    ids=ascii,
)
def test_row_without_an_answer_is_submitted_again(store, fields):
    with StubServer(longer_wins) as server:
        change_first_rows(server, **fields)
        run = judge_by_batch(server, store, matchups(1))
    assert run.stopped is None and run.statuses() == {"ok": 2} and len(server.batches) == 2
    assert run.ledger.num_open == 0


@pytest.mark.parametrize("cut", CUTS, ids=ascii)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=ascii)
def test_unicode_line_ends_do_not_cut_a_row(store, cut, end):
    def behave(shown, count):
        return json.dumps({"comparison": f"One{cut}is{cut}", "preferred": "A"}, ensure_ascii=False)

    with StubServer(behave) as server:
        change_answer_files(server, lambda content: content.replace("\n", end) + end)
        run = judge_by_batch(server, store, matchups(2))
        assert any(cut in content for content in server.files.values())
    assert run.stopped is None and run.statuses() == {"ok": 4} and len(server.batches) == 1
    assert all(json.loads(call.text)["comparison"] == f"One{cut}is{cut}" for call in run.calls)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "file-1 is empty; expected 2 answers"),
        ('{"custom_id": "a"', "line 1 of file-1 is not a row of a batch"),
        ("{}\n", "line 1 of file-1 is not a row"),
        ("null", "line 1 of file-1 is not a row"),
        ('{"custom_id": []}', "line 1 of file-1 is not a row"),
        ("<html>", "line 1 of file-1 is not a row of a batch: <html>"),
        (NESTED, "line 1 of file-1 is not a row"),
    ],
    ids=["empty", "cut", "object", "null", "custom_id", "page", "nested"],
)
def test_damaged_answer_file_stops_the_run_and_nothing_is_paid_twice(store, file, message):
    with StubServer(longer_wins) as server:
        change_answer_files(server, lambda content: file)
        run = judge_by_batch(server, store, matchups(1))
        assert message in str(run.stopped) and run.ledger.num_open == 2
        del server.keep_file
        server.files["file-1"] = "\n".join(
            json.dumps(
                {
                    "custom_id": json.loads(line)["custom_id"],
                    "response": {
                        "status_code": 200,
                        "body": chat_completion('{"comparison": "", "preferred": "A"}'),
                    },
                }
            )
            for line in server.files["file-0"].split("\n")
            if line
        )
        again = judge_by_batch(server, store, matchups(1))
    assert again.statuses() == {"ok": 2} and len(server.batches) == 1


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ("queue is full", "was not accepted: queue is full"),
        ([], "was not accepted: no reason given"),
        ({"data": "queue"}, "was not accepted: queue"),
        ({"data": ["queue"]}, "was not accepted: None: queue"),
        ({"data": [{"message": None}]}, "was not accepted: None: "),
    ],
    ids=str,
)
def test_odd_reasons_of_a_batch_that_is_not_accepted(store, errors, message):
    plan = {"status": "failed", "errors": errors}
    with StubServer(longer_wins, batch_plan=lambda number, rows: plan) as server:
        run = judge_by_batch(server, store, matchups(1))
    assert message in str(run.stopped) and run.ledger.usd == 0.0
