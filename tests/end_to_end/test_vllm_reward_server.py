"""A real vLLM server of a classifier as the reward: its scores are the logits that transformers computes."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request

import pytest
import torch
from online_runs import forget_precision
from reward_requests import conversation, plain, remote, rows_of
from reward_servers import free_port
from tiny_tokenizers import CHATML, single_bytes
from transformers import LlamaConfig, LlamaForSequenceClassification
from vllm_runs import PYTHON, SECONDS, needs_vllm

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.rewards import Completion

pytestmark = [needs_vllm, pytest.mark.timeout(600)]
SETTINGS = ("reward.server.kind=vllm", "reward.batch_size=4", "reward.server.stop_text=<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random classifier with one label; its heads have a width that vLLM's CPU kernels take."""
    folder = tmp_path_factory.mktemp("vllm_reward")
    tokenizer = single_bytes()
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "num_labels": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.2, **sizes, **ends
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    port = free_port()
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "rm"),
        "--port",
        str(port),
    ]
    command += ["--runner", "pooling", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--enforce-eager"],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    while True:
        assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    yield url
    os.killpg(server.pid, 9)
    server.wait()


def test_scores_are_the_logits_of_texts_and_conversations(folder, url, tmp_path):
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    model = LlamaForSequenceClassification.from_pretrained(folder / "rm").eval()
    tokenizer, reward = single_bytes(), remote(url, engine, folder / "rm", *SETTINGS)

    @torch.no_grad()
    def logit(text: str) -> float:
        return model(torch.tensor([tokenizer(text).input_ids])).logits.item()

    rows = rows_of(plain)
    expected = [logit(row.prompt + row.response + "<|endoftext|>" * row.ended) for row in rows]
    assert reward(rows) == pytest.approx(expected, abs=1e-4)

    turns = "<|im_start|>user\nWhy {0}?<|im_end|>\n<|im_start|>assistant\nBecause {0}<|im_end|>\n"
    assert reward(rows_of(conversation)) == pytest.approx(
        [logit(turns.format(n)) for n in range(11)], abs=1e-4
    )

    long = Completion("x" * 300, "y", True, [1], [2], plain(0).record)
    with pytest.raises(ConfigError, match="/classify answers 400: .*maximum context length is 256"):
        reward([long])
    forget_precision()
