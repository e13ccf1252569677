"""The cache of reference log-probs: exact per token, reused without the reference, refused when anything differs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_pairs import PAIRS, naive_logprobs
from offline_runs import RECIPE
from online_runs import forget_precision
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from drpo.config import ConfigError
from drpo.data.load import DataConfig, load_examples
from drpo.data.tasks.demo import DemoConfig
from drpo.engine import Engine, EngineConfig
from drpo.run.folder import RunFolder
from drpo.tensors import PaddedBatch
from drpo.trainers.offline import BatchConfig
from drpo.trainers.preference import reference_cache
from drpo.trainers.preference.dataset_logprobs import all_logprobs
from drpo.trainers.preference.pair_objective import block_logprobs
from drpo.trainers.preference.recipe import PreferenceRecipe

RUN = {"num_steps": 2, "eval": {"every": 2}}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def cached(cache: Path) -> dict:
    return {**RUN, "reference": {"cache_dir": str(cache)}}


def assert_as_live(rows: list[dict], live: list[dict]) -> None:
    """In the first step policy and reference are one, and rounding alone says who wins."""
    for left, right in zip(rows, live, strict=True):
        drop = {"train/accuracy"} if left["step"] == 1 else set()
        left, right = ({k: v for k, v in row.items() if k not in drop} for row in (left, right))
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


# --- what is in it ----------------------------------------------------------------------------------------


def test_it_holds_the_log_probs_of_every_token_and_trains_as_live_ones_do(
    preference_run, policy_folder, cache
):
    rows, _ = preference_run(**cached(cache))
    live, _ = preference_run(**RUN)
    assert_as_live(rows, live)
    data = DataConfig(demo=DemoConfig(**RECIPE["data"]["demo"]))
    splits = load_examples(data, AutoTokenizer.from_pretrained(policy_folder), "pairs")
    model = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    with torch.no_grad():
        expected = torch.cat(
            [
                naive_logprobs(model, example.query_ids, ids)
                for example in (*splits.train, *splits.eval)
                for ids in (example.chosen_ids, example.rejected_ids)
            ]
        )
    found = np.load(cache / "logprobs.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_tokens_may_be_weighted_afterwards(preference_run, tmp_path, cache):
    """Sums over responses, which TRL keeps, could not be."""
    rows = [
        {
            "prompt": f"post {i}",
            "chosen": f" good{i}\n and fine",
            "rejected": f" bad\n worse{i}",
            "chosen_relevance": [i % 2, 1],
            "rejected_relevance": [1, i % 2],
        }
        for i in range(24)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "own", "path": str(tmp_path / "own.jsonl"), "eval_fraction": 0.3}
    plain, _ = preference_run(data=data, **cached(cache))
    weights = {"loss": {"token_weights": {"gamma": 0.3}}}
    weighted, _ = preference_run(data=data, **cached(cache), **weights)
    live, _ = preference_run(data=data, **RUN, **weights)
    assert_as_live(weighted, live)
    assert weighted[-1]["train/reward_margin"] != pytest.approx(plain[-1]["train/reward_margin"], rel=1e-2)


def test_a_curriculum_may_use_it_while_its_reference_stays(preference_run, cache):
    curriculum = {"curriculum": {"num_stages": 2, "reference": "initial"}, "eval": {"every": 0}}
    rows, _ = preference_run(**{**cached(cache), **curriculum})
    again, _ = preference_run(**{**cached(cache), **curriculum})
    live, _ = preference_run(**{**RUN, **curriculum})
    assert rows == again
    assert_as_live(rows, live)


# --- reuse ------------------------------------------------------------------------------------------------


def test_the_next_run_loads_no_reference_and_is_the_same(preference_run, cache, monkeypatch, capsys):
    made: Counter[str] = Counter()
    make = GPTNeoXForCausalLM.__init__

    def counting(self, *args, **kwargs) -> None:
        made["models"] += 1
        make(self, *args, **kwargs)

    monkeypatch.setattr(GPTNeoXForCausalLM, "__init__", counting)
    first, _ = preference_run(**cached(cache))
    assert made.pop("models") == 2
    written = {file.name: file.read_bytes() for file in cache.iterdir()}
    second, _ = preference_run(**cached(cache))
    assert made["models"] == 1
    assert second == first
    assert f"reference log-probs: read from {cache}" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == written


def test_under_lora_a_run_reports_the_same_whether_it_filled_the_cache_or_not(preference_run, cache):
    sample = {"num_prompts": 3, "max_response_length": 5}
    settings = {**cached(cache), "model": {"lora": {"r": 2}}, "sample": sample}
    first, _ = preference_run(**settings)
    assert "eval/kl" in first[-1]
    assert preference_run(**settings)[0] == first


@pytest.mark.parametrize("loss", [{"name": "ipo"}, {"name": "dpo", "beta": 0.5, "dr_dpo": {}}])
def test_other_losses_take_it_too(preference_run, cache, loss):
    preference_run(**{**cached(cache), "num_steps": 1})
    rows, _ = preference_run(**cached(cache), loss=loss)
    live, _ = preference_run(**RUN, loss=loss)
    assert_as_live(rows, live)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def refused(preference_run, policy_folder, cache, tmp_path) -> Callable[..., str]:
    """The message of a run with a cache that a plain run filled; nothing of the run or the cache is touched."""
    preference_run(**cached(cache))
    before = {file.name: file.read_bytes() for file in cache.iterdir()}

    def start(damage: Callable[[Path], object] | None = None, **changes) -> str:
        after = before
        if damage is not None:
            damage(cache)
            after = {file.name: file.read_bytes() for file in cache.iterdir()}
        with pytest.raises(ConfigError) as refusal:
            preference_run(name="refused", **cached(cache), **changes)
        assert {file.name: file.read_bytes() for file in cache.iterdir()} == after
        assert not (tmp_path / "refused").exists()
        assert str(refusal.value).startswith("reference.cache_dir: ") and str(cache) in str(refusal.value)
        return str(refusal.value)

    return start


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"data": {**RECIPE["data"], "limit": 39}}, ["num_pairs: 51 -> 50", "token_ids: "]),
        ({"data": {**RECIPE["data"], "noise": {"flip_rate": 0.3}}}, ["token_ids: "]),
        ({"engine": {"mixed_precision": "bf16"}}, ["mixed_precision: no -> bf16"]),
        ({"model": {"dtype": "bfloat16"}}, ["dtype: float32 -> bfloat16"]),
        ({"model": {"attn_implementation": "eager"}}, ["attn_implementation: None -> eager"]),
    ],
    ids=["fewer rows", "noise", "precision", "dtype", "attention"],
)
def test_a_cache_of_other_numbers_is_refused_by_what_differs(refused, changes, named):
    message = refused(**changes)
    for part in (*named, "name another folder, or delete this one"):
        assert part in message
    assert message.count(" -> ") == len(named)


def test_other_weights_are_refused_and_the_same_ones_elsewhere_are_not(
    refused, preference_run, policy_folder, tmp_path
):
    copied = tmp_path / "copied"
    shutil.copytree(policy_folder, copied)
    assert preference_run(policy=copied, **cached(tmp_path / "cache"))[0]
    weights = load_file(copied / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "reference: " in refused(policy=copied)
    # It is the reference that counts, not the policy.
    rows, _ = preference_run(
        policy=copied,
        **RUN | {"reference": {"path": str(policy_folder), "cache_dir": str(tmp_path / "cache")}},
    )
    assert rows


def cut(cache: Path) -> None:
    whole = (cache / "logprobs.npy").read_bytes()
    (cache / "logprobs.npy").write_bytes(whole[: len(whole) // 2])


def hollow(cache: Path) -> None:
    """As a machine that loses its power may leave it."""
    whole = (cache / "logprobs.npy").read_bytes()
    (cache / "logprobs.npy").write_bytes(whole[:256] + bytes(len(whole) - 256))


@pytest.mark.parametrize(
    "damage, named",
    [
        (cut, "logprobs.npy: "),
        (hollow, "logprobs.npy is not what was written"),
        (lambda cache: (cache / "logprobs.npy").write_bytes(b""), "logprobs.npy: "),
        (lambda cache: (cache / "logprobs.npy").unlink(), "logprobs.npy: "),
        (lambda cache: np.save(cache / "logprobs.npy", np.zeros(3, np.float32)), "not what was written"),
        (lambda cache: (cache / "key.json").write_text("{"), "key.json: "),
        (lambda cache: (cache / "key.json").write_text("[1, 2]"), "key.json: "),
    ],
    ids=["cut", "hollow", "empty", "gone", "another array", "cut key", "no key"],
)
def test_a_damaged_cache_is_named_and_what_to_do(refused, damage, named):
    message = refused(damage)
    assert "is damaged, delete it to compute the log-probs anew" in message and named in message


def test_a_folder_with_something_else_is_left_alone(preference_run, cache):
    cache.mkdir()
    (cache / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="reference.cache_dir: .* holds something else"):
        preference_run(**cached(cache))
    assert [file.name for file in cache.iterdir()] == ["thesis.tex"]


# --- kills and company ------------------------------------------------------------------------------------


def test_a_kill_while_it_is_written_leaves_no_half_cache(preference_run, cache, monkeypatch):
    """At the last moment: all is written but the name."""

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reference_cache.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            preference_run(name="killed", **cached(cache))
    assert not cache.exists()
    forget_precision()
    rows, _ = preference_run(name="killed", **cached(cache))
    assert rows == preference_run(**cached(cache))[0]


def test_an_empty_folder_is_filled_and_one_that_another_run_filled_meanwhile_is_used(
    preference_run, cache, monkeypatch
):
    cache.mkdir()
    rows, _ = preference_run(**cached(cache))
    filled = {file.name: file.read_bytes() for file in cache.iterdir()}
    assert sorted(filled) == ["key.json", "logprobs.npy"]
    shutil.move(cache, cache.with_name("of another run"))
    save = np.save

    def slow_save(*arguments) -> None:
        save(*arguments)
        shutil.move(cache.with_name("of another run"), cache)

    monkeypatch.setattr(reference_cache.np, "save", slow_save)
    assert preference_run(**cached(cache))[0] == rows
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == filled
    assert not list(cache.parent.glob(".partial*"))


# --- all log-probs ----------------------------------------------------------------------------------------


def test_log_probs_of_prompts_with_any_number_of_responses_come_in_their_order(tmp_path):
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    recipe = PreferenceRecipe(run_dir=str(tmp_path / "run"))
    one_by_one, by_two = (
        RunFolder(replace(recipe, batch=BatchConfig(microbatch_size=size)), engine) for size in (1, 2)
    )
    model = tiny_model("gpt_neox")
    responses = [ids for pair in PAIRS for ids in pair.response_ids]
    prompts = [
        (pair.example.query_ids, responses[i : i + count])
        for i, (pair, count) in enumerate(zip(PAIRS, (2, 4, 1, 2, 3, 4, 1, 2), strict=True))
    ]
    shapes: list[tuple[int, int]] = []

    def score(rows: PaddedBatch, num_responses: int) -> torch.Tensor:
        shapes.append((len(rows.responses) // num_responses, num_responses))
        return block_logprobs(model, rows, num_responses, share_prompts=True)

    found = all_logprobs(by_two, prompts, 2, score)
    with torch.no_grad():
        for (query, answers), rows in zip(prompts, found, strict=True):
            expected = [naive_logprobs(model, query, answer) for answer in answers]
            assert_same(rows, expected)
    assert max(size for size, _ in shapes) == 2  # prompts at a time
    assert Counter(count for size, count in shapes for _ in range(size)) == {1: 2, 2: 3, 3: 1, 4: 2}
    with pytest.raises(FloatingPointError, match="log-probs of prompt 3 are not finite"):
        all_logprobs(one_by_one, prompts, 2, poisoned(score, prompts[3][0]))
    forget_precision()


def assert_same(rows: Sequence[np.ndarray], expected: Sequence[torch.Tensor]) -> None:
    for row, values in zip(rows, expected, strict=True):
        np.testing.assert_allclose(row, values.numpy(), rtol=0, atol=1e-5)


def poisoned(score: Callable, query: list[int]) -> Callable:
    def score_or_nan(rows: PaddedBatch, num_responses: int) -> torch.Tensor:
        hit = rows.queries[0][rows.query_mask[0]].tolist() == query
        return score(rows, num_responses) * (float("nan") if hit else 1.0)

    return score_or_nan
