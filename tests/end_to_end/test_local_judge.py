"""A judge of one's own, end to end: `transformers serve` as a real process, tiny models, launch/judge.py.

The models' weights are set by hand. Without attention the next token depends on the last one alone, so a model that
knows one word of its own says that word and stops.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from judge_runs import matchups
from tiny_models import tiny_model
from tiny_runs import CLEAN, plain
from tiny_tokenizers import CHATML, byte_level

from drpo.config import load_recipe
from drpo.run.stopped import RunStopped
from eval.completions.rows import CompletionRow, CompletionsWriter
from eval.judging.judge_systems import JudgeRecipe
from eval.judging.judge_systems import judge as run
from eval.judging.judgments import read_verdicts

for needed in ("fastapi", "uvicorn", "requests"):
    pytest.importorskip(needed, reason="transformers serve needs it")

NUM = 12
ANSWERS = {"first-slot": "Preferred: A", "polite": "Both are very nice."}
LONG = {"vocab_size": 600, "max_position_embeddings": 8192}


def save_model(folder: Path, answer: str | None) -> None:
    """A model that says `answer` and stops, or one of random weights."""
    tokenizer = byte_level(chat_template=CHATML)
    model = tiny_model("llama", **LONG)
    tokenizer.eos_token = "<|im_end|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if answer is not None:
        tokenizer.add_tokens([answer])
        speak(model, tokenizer.encode("assistant\n")[-1], tokenizer.encode(answer)[0], tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def speak(model, start: int, word: int, stop: int) -> None:
    """Let `word` follow `start`, and `stop` everything else."""
    for name, weight in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
    inner, outer = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
    inner[:, 0] = 1.0
    inner[start, :2] = torch.tensor([0.0, 1.0])
    outer[word, 1] = outer[stop, 0] = 10.0


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in (*ANSWERS, "random"):
        save_model(folder / name, ANSWERS.get(name))
    return folder


@pytest.fixture(scope="module")
def server(models) -> Iterator[str]:
    """The address of `transformers serve`, which loads whichever model a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**CLEAN, "HF_HUB_OFFLINE": "1", "HF_HOME": str(models / "hub")}
    script = Path(sys.executable).with_name("transformers")
    with (models / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [script, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            wait_until_up(f"http://127.0.0.1:{port}/health", process, models / "serve.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)


def write_recipe(folder: Path, url: str, model: Path, **changes) -> Path:
    """A recipe of launch/judge.py on the responses of two systems."""
    rows = []
    for c in matchups(NUM):
        for system, response in ((c.system_a, c.response_a), (c.system_b, c.response_b)):
            rows.append(CompletionRow(system, c.prompt_id, c.prompt, response, True, 9, 0))
    CompletionsWriter(folder / "c.jsonl", {}).write(rows)
    judge = {"model": str(model), "base_url": url, "output_limit": "max_tokens", "max_output_tokens": 16}
    settings = {"run_dir": str(folder / "run"), "completions": [str(folder / "c.jsonl")], "prompt": "tldr-1"}
    settings |= {"system": "good", "baseline": "long", "judge": judge | changes.pop("judge", {}), **changes}
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def judge(folder: Path, url: str, model: Path, **changes) -> Path:
    return run(load_recipe(JudgeRecipe, write_recipe(folder, url, model, **changes), []))


def summary(folder: Path) -> dict:
    return json.loads((folder / "run" / "summary.json").read_text())


def test_a_local_judge_that_always_says_a_is_worth_nothing(server, models, tmp_path):
    """The probe finds that it keeps to no schema and asks for text. Real verdicts, every one for the first slot."""
    command = [*plain("judge"), str(write_recipe(tmp_path, server, models / "first-slot"))]
    environment = {name: value for name, value in CLEAN.items() if not name.endswith("_API_KEY")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counts = summary(tmp_path)
    assert counts["statuses"]["ok"] == 2 * NUM and counts["undecided"] == 0
    assert counts["win_rate"]["rate"] == 0.5 and counts["position_bias"]["first_share"] == 1.0
    assert counts["position_bias"]["consistency"]["agreement"] == 0.0
    assert counts["position_bias"]["p_value"] == pytest.approx(2 / 2**NUM)
    assert "same verdict in both orders: 0.0% [" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run/judgments.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} == {"Preferred: A"}
    assert all(row["prompt_tokens"] > 500 and row["completion_tokens"] == 2 for row in rows), (
        "the server's count"
    )
    assert rows[0]["model_returned"].startswith(str(models / "first-slot"))


@pytest.mark.parametrize(
    ("model", "status"), [("polite", "malformed"), ("random", "truncated")], ids=["polite", "random"]
)
def test_a_local_model_that_gives_no_verdicts_wins_nothing_for_anybody(
    server, models, tmp_path, model, status
):
    """Answers arrive and are kept as they came; none is counted for a system, and the run says so and fails."""
    choices = {"form": "text", "probe": False, "max_reasks": 1}
    with pytest.raises(
        RunStopped, match=f"{NUM} of {NUM} comparisons are undecided, more than max_undecided=0.05"
    ):
        judge(tmp_path, server, models / model, judge=choices)
    counts = summary(tmp_path)
    assert counts["statuses"] == {**dict.fromkeys(counts["statuses"], 0), status: 2 * NUM}
    assert counts["win_rate"] is None and f"all {NUM} comparisons are undecided" in counts["win_rate_missing"]
    verdicts = read_verdicts(tmp_path / "run/judgments.jsonl")
    assert {verdict.winner for verdict in verdicts} == {None}
    rows = [json.loads(line) for line in (tmp_path / "run/judgments.jsonl").read_text().splitlines()]
    assert len(rows) == (4 * NUM if status == "malformed" else 2 * NUM), "unreadable ones were asked again"
    if model == "polite":
        assert {row["text"] for row in rows} == {ANSWERS["polite"]}
    else:
        assert all(row["text"] and row["completion_tokens"] == 16 for row in rows)


def test_the_probe_stops_before_every_answer_is_cut(server, models, tmp_path):
    with pytest.raises(RunStopped, match="cut at judge.max_output_tokens=16"):
        judge(tmp_path, server, models / "random")
    assert summary(tmp_path)["num_comparisons"] == 0


def test_a_model_that_the_server_cannot_load_is_told(server, models, tmp_path):
    with pytest.raises(RunStopped, match="the probe got no answer: HTTP 500"):
        judge(tmp_path, server, models / "nobody", retry={"max_attempts": 2, "base_delay": 0.01})
