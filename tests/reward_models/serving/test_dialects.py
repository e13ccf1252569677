"""Servers of other projects: stubs on real sockets, in the shapes of OpenRLHF's serve_rm and vLLM 0.32's /classify."""

from __future__ import annotations

import pytest
from reward_requests import conversation, plain, remote, rows_of
from reward_servers import StubServer

from drpo.config import ConfigError, load_recipe
from drpo.trainers.online_recipe import OnlineRecipe

OPENRLHF, VLLM = "reward.server.kind=openrlhf", "reward.server.kind=vllm"
MODELS = {"object": "list", "data": [{"id": "org/rm", "object": "model", "max_model_len": 512}, {"id": "b"}]}


def length(text: str) -> float:
    return len(text) / 8


def open_rlhf(path, body):
    if path != "/get_reward":
        return 404, {"detail": "Not Found"}
    return 200, {"rewards": [length(query) for query in body["query"]]}


def classify(path, body):
    if path == "/v1/models":
        return 200, MODELS
    assert path == "/classify" and body["use_activation"] is False
    texts = body["input"] if "input" in body else ["".join(m["content"] for m in body["messages"])]
    data = [
        {"index": i, "label": "LABEL_0", "probs": [length(text)], "num_classes": 1}
        for i, text in enumerate(texts)
    ]
    # The client must not trust the order.
    return 200, {"id": "classify-1", "object": "list", "model": body["model"], "data": data[::-1]}


def test_open_rlhf_gets_whole_texts_prompts_and_references(engine, tmp_path):
    with StubServer(open_rlhf) as server:
        reward = remote(server.url, engine, tmp_path, OPENRLHF, "reward.batch_size=4")
        rows = rows_of(plain)
        assert reward(rows) == [length(f"Question {n}: no {n}") for n in range(11)]
    bodies = sorted((body for _, body in server.requests), key=lambda body: int(body["prompts"][0][9:-1]))
    assert [len(body["query"]) for body in bodies] == [4, 4, 3]
    assert bodies[0]["query"][1] == "Question 1: no 1" and bodies[0]["prompts"][1] == "Question 1:"
    assert {path for path, _ in server.requests} == {"/get_reward"}
    assert all(set(body["labels"]) == {"label"} for body in bodies)


def test_open_rlhf_servers_may_have_a_path_of_their_own(engine, tmp_path):
    with StubServer(lambda path, body: (200, {"rewards": [1.0] * len(body["query"])})) as server:
        remote(f"{server.url}/my/reward", engine, tmp_path, OPENRLHF)(rows_of(plain))
    assert {path for path, _ in server.requests} == {"/my/reward"}


def test_vllm_classifies_texts_and_its_order_is_not_trusted(engine, tmp_path):
    with StubServer(classify) as server:
        reward = remote(
            server.url, engine, tmp_path, VLLM, "reward.batch_size=4", "reward.server.stop_text=<e>"
        )
        expected = [length(f"Question {n}: no {n}" + "<e>" * (n % 3 > 0)) for n in range(11)]
        assert reward(rows_of(plain)) == expected
        assert reward.identity == "vllm:org/rm, after a response '<e>'"
        named = remote(server.url, engine, tmp_path, VLLM, "reward.server.model=b")
        assert named.identity == "vllm:b"
        with pytest.raises(ConfigError, match="reward.server.model='c' is not served, but org/rm, b"):
            remote(server.url, engine, tmp_path, VLLM, "reward.server.model=c")


def test_vllm_gets_conversations_one_by_one_with_the_reply(engine, tmp_path):
    with StubServer(classify) as server:
        reward = remote(server.url, engine, tmp_path, VLLM, chat=True)
        assert reward(rows_of(conversation)) == [length(f"Why {n}?Because {n}") for n in range(11)]
    bodies = [body for path, body in server.requests if path == "/classify"]
    assert len(bodies) == 11
    assert bodies[0]["messages"][-1]["role"] == "assistant" and bodies[0]["model"] == "org/rm"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"data": [{"index": 0, "probs": [0.1, 0.9]}]}, "is no reward model: it gives 2 numbers for a text"),
        ({"data": [{"index": 1, "probs": [0.1]}]}, "is no reward model"),
        ({"data": [{"index": 0, "probs": [0.1]}], "model": "b"}, "b answers in place of org/rm"),
        ({"data": [{"index": 0, "probs": [None]}]}, "expected a list of finite numbers"),
        ({"data": []}, "gave 0 scores for 11 responses"),
        ({"error": "no"}, "reward.url: no classification"),
        ([], "reward.url: no classification"),
    ],
)
def test_what_is_no_classification_by_a_reward_model_stops_the_run(engine, tmp_path, answer, message):
    full = {"model": "org/rm"} | answer if isinstance(answer, dict) else answer
    with StubServer(lambda path, body: (200, MODELS if path == "/v1/models" else full)) as server:
        reward = remote(server.url, engine, tmp_path, VLLM)
        with pytest.raises(ConfigError, match=message):
            reward(rows_of(plain))


def test_an_open_rlhf_answer_without_rewards_stops_the_run(engine, tmp_path):
    with StubServer(lambda path, body: (200, {"scores": [1.0] * 11})) as server:
        reward = remote(server.url, engine, tmp_path, OPENRLHF)
        with pytest.raises(ConfigError, match="expected a list of finite numbers as 'rewards'"):
            reward(rows_of(plain))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.url=http://h:1", "reward.path=rm"], "reward.path cannot be given together with reward.url"),
        (
            ["reward.url=http://h:1", "reward.function=m:f"],
            "reward.function cannot be given together with reward.url",
        ),
        (["reward.url=h:1"], r"reward.url \(h:1\) must be http://host:port"),
        (["reward.server.kind=vllm"], "reward.server.kind is for reward.url, which is null"),
        (
            ["reward.url=http://h:1", "reward.dtype=bfloat16"],
            "reward.dtype is for a reward model in the training",
        ),
        (
            ["reward.url=http://h:1", "reward.server.model=m"],
            "reward.server.model is for reward.server.kind=vllm",
        ),
        (
            ["reward.url=http://h:1", OPENRLHF, "reward.server.expected_path=rm"],
            "reward.server.expected_path is for reward.server.kind=drpo",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(OnlineRecipe, None, overrides)
