"""Before the first question: models that are there, gone, going; servers that cannot tell; the form of the answers."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
from judge_runs import judge_config, judge_setup
from preflight_runs import check, probe
from stub_judge_server import (
    MODEL,
    Reply,
    StubServer,
    chat_completion,
    error,
    first_slot_wins,
    more_of_the_post_wins,
    verdict_text,
)

from eval.judging.judge import JudgeStopped
from eval.judging.openai.preflight import known_form
from eval.judging.openai.retry import RetryConfig
from eval.judging.openai.store import Store


@pytest.fixture
def store(tmp_path):
    return tmp_path / "s.sqlite"


# --- the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shutdown", "said"),
    [
        (None, []),
        ("2027-11-20", []),
        ("2026-12-01", ["stub-judge is shut down on 2026-12-01, in 11 days"]),
        ("2026-12-01T00:00:00Z", ["stub-judge is shut down on 2026-12-01, in 11 days"]),
        ("soon", []),
    ],
)
def test_a_model_that_is_there(shutdown, said):
    with StubServer(models={MODEL: shutdown}) as server:
        heard = check(server)
        assert server.chats == []
    assert len(heard) == len(said) and all(h.startswith(s) for h, s in zip(heard, said, strict=True))


def test_a_model_that_was_shut_down():
    with StubServer(models={MODEL: "2026-10-23"}) as server:
        with pytest.raises(JudgeStopped, match="was shut down on 2026-10-23; name another judge.model"):
            check(server)


def test_a_model_that_is_not_there_and_the_names_of_those_that_are():
    with StubServer(models={"gpt-x": None, "gpt-y": None}) as server:
        with pytest.raises(JudgeStopped, match="does not list the model stub-judge; it has: gpt-x, gpt-y"):
            check(server, config=judge_config(server, base_url=None))
        (said,) = check(server)
    assert "does not list the model stub-judge" in said, "a server at home may load what it does not list"


def test_a_server_that_only_lists_its_models():
    with StubServer(tells_models=False) as server:
        assert check(server) == []
    assert server.paths == [f"GET /v1/models/{MODEL}", "GET /v1/models"]


def test_a_server_that_does_not_know_the_address_is_only_reported():
    with StubServer(models={}) as server:
        (said,) = check(server)
        with pytest.raises(JudgeStopped, match="no model stub-judge"):
            check(server, config=judge_config(server, base_url=None))
    assert "does not tell which models it has" in said


def test_a_wrong_key_and_a_server_that_is_down_stop_at_once():
    with StubServer() as server:
        with pytest.raises(JudgeStopped, match="the API key is not accepted"):
            check(server, key="sk-other")
    with pytest.raises(JudgeStopped, match="http://127.0.0.1:.*connection failed"):
        check(server)


# --- the form ---------------------------------------------------------------------------------------------


def test_a_model_that_keeps_to_a_schema_is_asked_by_it(store):
    with StubServer(more_of_the_post_wins) as server:
        config = judge_config(server, form="auto")
        assert probe(server, store, config) == ("json", [])
        assert len(server.chats) == 1 and "response_format" in server.chats[0].body
        assert probe(server, store, config) == ("json", []) and len(server.chats) == 1, "it is paid once"
        with closing(Store(store)) as kept:
            assert known_form(judge_setup(config), kept) == "json"
            assert known_form(judge_setup(replace(config, temperature=None)), kept) is None


def refuses_schema(shown, count):
    if "response_format" in shown.body:
        return error(400, "response_format is not supported", None, "response_format")
    return "A"


def refuses_schema_without_a_word(shown, count):
    return error(422, "unexpected field") if "response_format" in shown.body else "A"


def ignores_schema(shown, count):
    body = {k: v for k, v in shown.body.items() if k != "response_format"}
    return "Comparison: x\nPreferred: A" if "response_format" in shown.body else verdict_text(body, "A")


@pytest.mark.parametrize("behaviour", [refuses_schema, refuses_schema_without_a_word, ignores_schema])
def test_a_model_that_does_not_is_asked_for_text(store, behaviour):
    """Some servers refuse a schema, some say so badly, and some take it and pay no heed."""
    with StubServer(behaviour) as server:
        config = judge_config(server, form="auto")
        assert probe(server, store, config) == ("text", [])
        assert len(server.chats) == 2
        assert probe(server, store, config) == ("text", []) and len(server.chats) == 2


def test_a_form_that_was_asked_for_is_not_changed(store):
    with StubServer(refuses_schema) as server:
        with pytest.raises(JudgeStopped, match="does not take a setting"):
            probe(server, store, judge_config(server, form="json"))
        assert probe(server, store, judge_config(server, form="text")) == ("text", [])


def test_a_temperature_that_the_model_does_not_take_is_told(store):
    with StubServer(first_slot_wins, unsupported=("temperature",)) as server:
        with pytest.raises(JudgeStopped, match="give judge.temperature=null"):
            probe(server, store, judge_config(server, form="auto"))
        config = judge_config(server, form="auto", temperature=None)
        assert probe(server, store, config)[0] == "json"


def test_an_answer_without_room_stops_before_it_is_paid_a_thousand_times(store):
    cut = Reply(body=chat_completion("", finish_reason="length"))
    with StubServer(lambda shown, count: cut) as server:
        with pytest.raises(JudgeStopped, match="cut at judge.max_output_tokens=100; reasoning models"):
            probe(server, store, judge_config(server, form="auto"))
    assert len(server.chats) == 1


def test_a_judge_that_cannot_be_read_is_reported(store):
    with StubServer(lambda shown, count: "Miaow.") as server:
        form, (said,) = probe(server, store, judge_config(server, form="auto"))
    assert form == "text" and "cannot be read (malformed" in said and "'Miaow.'" in said


def test_no_answer_at_all_stops(store):
    with StubServer(lambda shown, count: error(500, "down")) as server:
        with pytest.raises(JudgeStopped, match="the probe got no answer: HTTP 500: .*down"):
            probe(server, store, judge_config(server, form="auto"), RetryConfig(max_attempts=1))
