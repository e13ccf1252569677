"""The HTTP interface, on a real socket: scores, limits, refusals."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
from online_runs import forget_precision
from reward_model_folders import save_reward_model, score_alone
from reward_servers import LIMITS, serving
from tiny_tokenizers import CHATML, single_bytes

from drpo.engine import Engine, EngineConfig
from reward_models.score import RewardModelScorer
from reward_models.serving.identity import vocabulary_hash
from reward_models.serving.rows import Limits

HASH = vocabulary_hash(single_bytes())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model of single bytes, and its scorer as a server has it."""
    folder = tmp_path_factory.mktemp("rm")
    tokenizer = single_bytes()
    tokenizer.chat_template = CHATML
    saved = save_reward_model(folder, tokenizer)
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), folder, 0, None)
    yield saved, RewardModelScorer.load(str(folder), engine, 8, "float32", None, key="MODEL")
    forget_precision()


@pytest.fixture(scope="module")
def url(model):
    with serving(model[1]) as url:
        yield url


def post(url: str, rows: list[dict], **body) -> requests.Response:
    return requests.post(f"{url}/score", json={"rows": rows, **body}, timeout=30)


def ids_row(query: list[int], response: list[int], **more) -> dict:
    return {"query_ids": query, "response_ids": response, **more}


def test_texts_conversations_and_ids_have_the_scores_that_they_have_alone(url, model):
    saved, _ = model
    tokenizer = single_bytes()
    stop, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = [
        {"prompt": "The sky is", "response": " blue"},
        {"prompt": "The sky is", "response": " blue", "ended": False},
        {"messages": [{"role": "user", "content": "Sky?"}], "response": "Blue."},
        ids_row([40, 41], [90, 10]),
        ids_row([40, 41], [90, 10], ended=False),
        ids_row([40, 41], [90, 10], chat=True),
    ]
    chat = ids("<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n")
    expected = [
        score_alone(saved, ids("The sky is"), [*ids(" blue"), stop]),
        score_alone(saved, ids("The sky is"), ids(" blue")),
        score_alone(saved, chat, [*ids("Blue."), end]),
        score_alone(saved, [40, 41], [90, stop]),
        score_alone(saved, [40, 41], [90, 10]),
        score_alone(saved, [40, 41], [90, end]),
    ]
    answer = post(url, rows, tokenizer=HASH)
    assert answer.status_code == 200
    assert answer.json()["scores"] == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == 6


def test_32_clients_with_ragged_batches_each_get_the_scores_of_their_own_rows(url, model):
    saved, _ = model

    def client(number: int) -> list[tuple[float, float]]:
        draw, pairs = random.Random(number), []
        with requests.Session() as session:
            for _ in range(4):
                rows = [
                    ids_row(
                        draw.choices(range(10, 200), k=draw.randrange(1, 20)),
                        draw.choices(range(10, 200), k=draw.randrange(1, 15)),
                        ended=False,
                    )
                    for _ in range(draw.randrange(1, 10))
                ]
                body = {"rows": rows, "tokenizer": HASH}
                scores = session.post(f"{url}/score", json=body, timeout=60).json()["scores"]
                assert len(scores) == len(rows)
                sample = draw.randrange(len(rows))
                for row, score in list(zip(rows, scores, strict=True))[sample:]:
                    pairs.append((score, (row["query_ids"], row["response_ids"])))
        return pairs

    with ThreadPoolExecutor(32) as pool:
        answers = [pair for pairs in pool.map(client, range(32)) for pair in pairs]
    expected = [score_alone(saved, *ids) for _, ids in answers]
    assert [score for score, _ in answers] == pytest.approx(expected, abs=1e-5)
    assert len(answers) > 200


def test_info_tells_what_a_run_compares(url, model):
    info = requests.get(f"{url}/info", timeout=30).json()
    assert (info["name"], info["centre"], info["scale"], info["aggregation"]) == ("rm", 0.5, 1.0, "last")
    assert info["tokenizer"] == HASH and len(info["model"]) == 64 and info["template"] is not None
    assert info["reads_chat"] is True
    assert info["chat_template"] is None and info["precision"] == "torch.float32, no"
    assert (info["max_tokens"], info["max_rows"], info["max_bytes"]) == (60, 64, 1 << 16)
    assert requests.get(f"{url}/health", timeout=30).json() == {"status": "ok"}


GOOD = {"prompt": "a", "response": "b"}
BAD = [
    ({"rows": []}, 422, "rows: List should have at least 1 item"),
    ({"rows": [GOOD, {}]}, 422, "rows[1]: give prompt and response, messages and response, or query_ids"),
    ({"rows": [{"prompt": "a"}]}, 422, "rows[0]: give prompt and response"),
    ({"rows": [{**GOOD, "messages": [{"role": "user", "content": "a"}]}]}, 422, "rows[0]: give prompt"),
    ({"rows": [{"prompt": 1, "response": "b"}]}, 422, "rows[0].prompt: Input should be a valid string"),
    ({"rows": [{**GOOD, "path": "/etc/passwd"}]}, 422, "rows[0].path: Extra inputs are not permitted"),
    ({"rows": [{**GOOD, "ended": "yes"}]}, 422, "rows[0].ended: Input should be a valid boolean"),
    ({"rows": [{**GOOD, "chat": True}]}, 422, "rows[0]: chat is for token ids"),
    ({"rows": [{"prompt": "a", "response": "", "ended": False}]}, 422, "rows[0]: the response has no token"),
    ({"rows": [{"prompt": "", "response": "b"}]}, 422, "rows[0]: the prompt has no token"),
    ({"rows": [{"prompt": "a" * 60, "response": "b"}]}, 422, "rows[0]: 62 tokens, prompt and response; this"),
    ({"rows": [{"messages": [], "response": "b"}]}, 422, "rows[0]: messages is empty"),
    ({"rows": [{"messages": [{"content": "a"}], "response": "b"}]}, 422, "rows[0]: missing field: no role"),
    ({"rows": [{"messages": [{"role": "user", "content": 3}], "response": "b"}]}, 422, "is not text"),
    ({"rows": [{"messages": [{"role": "user"}], "response": "b"}]}, 422, "rows[0]: a chat template refuses"),
    ({"rows": [{"messages": [{"role": "assistant", "content": "a"}], "response": "b"}]}, 422, "to answer"),
    ({"rows": [ids_row([1], [2])]}, 409, "rows[0]: token ids of another vocabulary than this model's ("),
    ({"rows": [ids_row([1], [2])], "tokenizer": "0" * 64}, 409, "send texts"),
    ({"rows": [ids_row([1], [5000])], "tokenizer": HASH}, 422, "rows[0]: token id 5000, and the model has"),
    ({"rows": [ids_row([1], [-1])], "tokenizer": HASH}, 422, "rows[0].response_ids[0]: Input should be gre"),
    ({"rows": [ids_row([1], [2.5])], "tokenizer": HASH}, 422, "rows[0].response_ids[0]: Input should be a v"),
    ({"rows": [ids_row([1], [])], "tokenizer": HASH}, 422, "rows[0]: response_ids is empty"),
    ({"rows": [ids_row([], [1])], "tokenizer": HASH}, 422, "rows[0]: the prompt has no token"),
    ({"rows": [GOOD] * 65}, 413, "65 rows in a request, this server takes 64"),
    ({"rows": [{"prompt": "a" * (1 << 16), "response": "b"}]}, 413, "more than the 65536 bytes that"),
    ({"row": []}, 422, "rows: Field required (and 1 more)"),
    ([GOOD], 422, "the body: Input should be an object"),
]


@pytest.mark.parametrize(("body", "status", "reason"), BAD, ids=range(len(BAD)))
def test_wrong_input_is_answered_with_4xx_and_the_reason(url, body, status, reason):
    answer = requests.post(f"{url}/score", json=body, timeout=30)
    assert answer.status_code == status and reason in answer.json()["detail"], answer.text
    assert "passwd" not in answer.text


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"{", "application/json", 422, "the body: Invalid JSON"),
        (b"", "application/json", 422, "the body: Invalid JSON"),
        (b"\xff\xfe", "application/json", 422, "the body: Invalid JSON"),
        (rb'{"rows": [{"prompt": "\ud800", "response": "b"}]}', "application/json", 422, "Invalid JSON"),
        (b"[" * 60_000, "application/json", 422, "the body: Invalid JSON"),
        (json.dumps({"rows": [GOOD]}).encode(), "text/plain", 415, "the body must be application/json"),
    ],
)
def test_bodies_that_are_no_json_are_refused(url, content, kind, status, reason):
    answer = requests.post(f"{url}/score", data=content, headers={"Content-Type": kind}, timeout=30)
    assert answer.status_code == status and reason in answer.json()["detail"], answer.text


@pytest.mark.parametrize("num_parts", [100, 5000])
def test_a_body_of_unknown_length_is_refused_at_the_limit(url, num_parts):
    answer = requests.post(
        f"{url}/score",
        data=(b" " * 1000 for _ in range(num_parts)),
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert answer.status_code == 413 and "more than the 65536 bytes" in answer.json()["detail"]


def test_with_a_token_only_those_who_have_it_are_answered(model):
    with serving(model[1], token="s3cret") as url:
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
            for answer in (
                requests.get(f"{url}/info", headers=headers, timeout=30),
                requests.post(f"{url}/score", json={"rows": [GOOD]}, headers=headers, timeout=30),
            ):
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert "rm" not in answer.text.split("detail")[0]
        headers = {"Authorization": "Bearer s3cret"}
        answer = requests.post(f"{url}/score", json={"rows": [GOOD]}, headers=headers, timeout=30)
        assert answer.status_code == 200 and len(answer.json()["scores"]) == 1
        assert requests.get(f"{url}/health", timeout=30).status_code == 200


def test_more_rows_than_may_wait_are_refused_for_now(model):
    with serving(model[1], max_waiting=4, max_wait=0.5) as url, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(url, [GOOD] * 4), range(8)))
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(len(a.json()["scores"]) == 4 for a in answers if a.status_code == 200)
    assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 503)


def test_more_requests_than_may_be_open_are_refused_for_now(model):
    body = json.dumps({"rows": [GOOD]}).encode()
    head = [
        "POST /score HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    with serving(model[1], max_requests=1) as url:
        slow = socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=30)
        slow.sendall("\r\n".join([*head, "", ""]).encode() + body[:10])
        while (answer := post(url, [GOOD])).status_code == 200:  # the slow one is not read yet
            pass
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        assert answer.json()["detail"] == "as many requests are open as this server takes at a time, 1"
        large = requests.post(f"{url}/score", json={"rows": [GOOD] * 64}, timeout=30)
        assert large.status_code == 503, "its body is read and dropped"
        assert requests.get(f"{url}/info", timeout=30).status_code == 200
        slow.sendall(body[10:])
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        slow.close()
        assert post(url, [GOOD]).status_code == 200


def test_the_smaller_of_the_limits_on_tokens_counts(model):
    """The tiny model itself has rotary positions, without an end."""
    for limit in (None, 7):
        limits = Limits(LIMITS.max_rows, LIMITS.max_bytes, limit)
        with serving(model[1], limits) as url:
            assert requests.get(f"{url}/info", timeout=30).json()["max_tokens"] == limit


def test_a_model_trained_on_conversations_refuses_plain_texts_and_the_reverse(model):
    _, scorer = model
    plain, chat = {"prompt": "a", "response": "b"}, [{"role": "user", "content": "a"}]
    for trained, wrong in ((True, plain), (False, {"messages": chat, "response": "b"})):
        scorer.model.config.chat_template = trained
        try:
            with serving(scorer) as url:
                for row in (wrong, ids_row([1], [2], chat=not trained)):
                    answer = post(url, [row], tokenizer=HASH)
                    assert answer.status_code == 422
                    assert "this reward model was trained on" in answer.json()["detail"]
        finally:
            scorer.model.config.chat_template = None
