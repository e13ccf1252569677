"""A server as a RewardFn: equal to the scorer itself, patient with one that is away, strict with another model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reward_model_folders import save_reward_model
from reward_requests import conversation, plain, remote, rows_of
from reward_servers import LIMITS, StubServer, free_port, serving
from tiny_tokenizers import CHATML, byte_level, single_bytes

from drpo.config import ConfigError
from reward_models.score import RewardModelScorer
from reward_models.serving.rows import Limits

INFO = {
    "name": "stub",
    "model": "a" * 64,
    "centre": 0.0,
    "scale": 1.0,
    "aggregation": "last",
    "tokenizer": "b" * 64,
    "template": None,
    "reads_chat": False,
    "chat_template": None,
    "chat_template_kwargs": {},
    "max_tokens": 60,
    "max_rows": 64,
    "max_bytes": 1 << 20,
}


@pytest.mark.parametrize("make", [plain, conversation])
@pytest.mark.parametrize("shared", [True, False], ids=["shared tokenizer", "another tokenizer"])
def test_served_and_local_scores_are_equal(tmp_path, engine, policy, make, shared):
    chat = make is conversation
    tokenizer = single_bytes() if shared else byte_level(vocab_size=300, bos=True)
    tokenizer.chat_template = CHATML
    save_reward_model(tmp_path / "rm", tokenizer)
    loaded = [str(tmp_path / "rm"), engine, 4, "float32"]
    local = RewardModelScorer.load(*loaded, str(policy))
    with serving(RewardModelScorer.load(*loaded, None, key="MODEL")) as url:
        reward = remote(url, engine, policy, "reward.batch_size=3", chat=chat)
        scores = reward(rows_of(make))
    torch.testing.assert_close(torch.tensor(scores), local(rows_of(make)), atol=1e-5, rtol=0)
    assert len({round(score, 4) for score in scores}) == 11
    assert reward.max_tokens == (60 if shared else None)


def test_another_chat_template_makes_the_messages_be_read(tmp_path, engine, policy):
    tokenizer = single_bytes()
    tokenizer.chat_template = CHATML.replace("role }}", "role }}:").replace("assistant\n", "assistant:\n")
    save_reward_model(tmp_path / "rm", tokenizer)
    loaded = [str(tmp_path / "rm"), engine, 4, "float32"]
    local = RewardModelScorer.load(*loaded, str(policy))
    with serving(RewardModelScorer.load(*loaded, None, key="MODEL")) as url:
        scores = remote(url, engine, policy, chat=True)(rows_of(conversation))
    torch.testing.assert_close(torch.tensor(scores), local(rows_of(conversation)), atol=1e-5, rtol=0)


def test_32_clients_get_the_scores_of_their_own_rows(tmp_path, engine, policy):
    save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 16, "float32", None, key="MODEL")
    local = RewardModelScorer.load(str(tmp_path / "rm"), engine, 16, "float32", str(policy))
    with serving(scorer) as url:
        rewards = [remote(url, engine, policy, "reward.batch_size=5") for _ in range(32)]
        rows = [[plain(i * j % 97, ended=bool(j % 2)) for j in range(1 + i % 13)] for i in range(32)]
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda reward, own: reward(own), rewards, rows))
    for scores, own in zip(found, rows, strict=True):
        torch.testing.assert_close(torch.tensor(scores), local(own), atol=1e-5, rtol=0)


# --- the start ------------------------------------------------------------------------------------------


def test_the_model_of_the_expected_folder_must_be_served(tmp_path, engine, policy):
    tokenizer = single_bytes()
    served = save_reward_model(tmp_path / "served", tokenizer)
    scorer = RewardModelScorer.load(str(tmp_path / "served"), engine, 4, "float32", None, key="MODEL")
    served.config.scale = 2.0
    served.save_pretrained(tmp_path / "scaled")
    tokenizer.save_pretrained(tmp_path / "scaled")
    save_reward_model(tmp_path / "other", byte_level(vocab_size=300))
    expected = "reward.server.expected_path="
    with serving(scorer) as url:
        remote(url, engine, policy, f"{expected}{tmp_path / 'served'}")
        with pytest.raises(ConfigError, match=r"expected_path: .*scaled' has scale 2.0, and .* rm has 1.0"):
            remote(url, engine, policy, f"{expected}{tmp_path / 'scaled'}")
        with pytest.raises(ConfigError, match=r"expected_path: .*other' has tokenizer '\w{64}', and"):
            remote(url, engine, policy, f"{expected}{tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("info", "chat", "message"),
    [
        ({"chat_template": True, "template": "c"}, False, "trained with data.chat_template=True, and the"),
        (
            {"chat_template": False, "reads_chat": False},
            True,
            "trained with data.chat_template=False, and the policy's",
        ),
        ({}, True, "the prompts are conversations, and the tokenizer of stub has no chat template"),
        ({"max_rows": 8}, False, "batch_size=32 rows in a request, and the server takes 8"),
    ],
)
def test_a_server_that_cannot_serve_the_run_is_refused_at_the_start(engine, policy, info, chat, message):
    with StubServer(lambda path, body: (200, INFO | info)) as server:
        with pytest.raises(ConfigError, match=f"^reward[.].*{message}"):
            remote(server.url, engine, policy, chat=chat)


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, {"hello": 1}, "/info is not that of launch/serve_reward_model.py"),
        (200, b"<html>", "/info answers with something else than JSON: '<html>'"),
        (404, b"not here", r"/info answers 404: not here \(another kind of server: see reward.server.kind\)"),
        (401, b"no", r"answers 401: no \(set the token in the environment variable DRPO_REWARD_TOKEN\)"),
    ],
)
def test_what_is_no_reward_server_is_refused_at_once(engine, policy, status, answer, message):
    with StubServer(lambda path, body: (status, answer)) as server:
        with pytest.raises(ConfigError, match=message):
            remote(server.url, engine, policy, "reward.server.timeout_minutes=9")


def test_the_token_of_the_environment_is_sent(engine, policy, monkeypatch):
    monkeypatch.setenv("DRPO_REWARD_TOKEN", "s3cret")
    with StubServer(lambda path, body: (200, INFO)) as server:
        remote(server.url, engine, policy)
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


# --- a server that is away or another -------------------------------------------------------------------


def test_a_server_that_never_comes_stops_the_run(engine, policy):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ConfigError, match=r"does not answer /info.*waited reward.server.timeout_minutes=0.01"
    ):
        remote(url, engine, policy, "reward.server.timeout_minutes=0.01")


def test_a_server_that_comes_back_is_waited_for(tmp_path, engine, policy, caplog):
    save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 16, "float32", None, key="MODEL")
    port = free_port()
    with serving(scorer, port=port) as url:
        reward = remote(url, engine, policy, "reward.server.timeout_minutes=1")
        scores = reward(rows_of(plain))
    again: list[list[float]] = []
    waiting = threading.Thread(target=lambda: again.append(reward(rows_of(plain))))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    with serving(scorer, port=port):
        waiting.join(30)
    torch.testing.assert_close(torch.tensor(again), torch.tensor([scores]), atol=1e-5, rtol=0)
    assert "does not answer /score" in caplog.text and "waiting for it" in caplog.text


@pytest.mark.parametrize("limit", [{"max_waiting": 2}, {"max_requests": 1}])
def test_a_busy_server_is_asked_again_and_nothing_is_lost(tmp_path, engine, policy, limit):
    save_reward_model(tmp_path / "rm", single_bytes())
    loaded = [str(tmp_path / "rm"), engine, 4, "float32"]
    local = RewardModelScorer.load(*loaded, str(policy))
    scorer = RewardModelScorer.load(*loaded, None, key="MODEL")
    with serving(scorer, **limit, max_wait=0) as url:
        settings = ("reward.batch_size=2", "reward.server.num_requests=6", "reward.server.timeout_minutes=1")
        scores = remote(url, engine, policy, *settings)(rows_of(plain))
    torch.testing.assert_close(torch.tensor(scores), local(rows_of(plain)), atol=1e-5, rtol=0)


def test_a_server_started_again_with_another_model_stops_the_run(engine, policy):
    """It was away for the first request."""
    first = threading.Event()

    def act(path, body):
        if path == "/info":
            return 200, INFO
        if not first.is_set():
            first.set()
            return 503, b"busy"
        return 200, {"model": "c" * 64, "scores": [0.0] * len(body["rows"])}

    with StubServer(act) as server:
        reward = remote(server.url, engine, policy, "reward.batch_size=6")
        with pytest.raises(ConfigError, match=r"another model than at the start of this run \(c+, not a+\)"):
            reward(rows_of(plain))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1.0]}, "gave 1 scores for 11 responses"),
        ({"scores": [float("nan")] * 11}, "expected a list of finite numbers as 'scores'"),
        ({"scores": [[1.0]] * 11}, "expected a list of finite numbers"),
        ({"scores": [True] * 11}, "expected a list of finite numbers"),
        ({}, "expected a list of finite numbers"),
        ([], "expected a list of finite numbers"),
    ],
)
def test_an_answer_that_is_no_list_of_scores_stops_the_run(engine, policy, answer, message):
    named = answer | {"model": INFO["model"]} if isinstance(answer, dict) else answer
    with StubServer(lambda path, body: (200, INFO if path == "/info" else named)) as server:
        reward = remote(server.url, engine, policy)
        with pytest.raises(ConfigError, match=f"reward.url: .*{message}"):
            reward(rows_of(plain))


def test_an_error_of_one_request_is_raised_while_another_hangs(engine, policy):
    hanging = threading.Event()

    def act(path, body):
        if path == "/info":
            return 200, INFO
        if body["rows"][0]["prompt"] == "Question 0:":
            hanging.wait(20)
            return 200, {"model": INFO["model"], "scores": [0.0] * 6}
        return 500, b"the model failed"

    with StubServer(act) as server:
        reward = remote(server.url, engine, policy, "reward.batch_size=6")
        with pytest.raises(ConfigError, match="/score answers 500: the model failed"):
            reward(rows_of(plain))
        assert not hanging.is_set()
        hanging.set()


def test_limits_on_bytes_are_told(tmp_path, engine, policy):
    save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 4, "float32", None, key="MODEL")
    with serving(scorer, Limits(LIMITS.max_rows, 200, None)) as url:
        reward = remote(url, engine, policy)
        with pytest.raises(ConfigError, match="a request has .* bytes, and .* takes 200: lower reward.ba"):
            reward(rows_of(plain))
