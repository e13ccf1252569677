"""The benchmark of DPO steps: its inputs, its arithmetic, and our side of it as a real run. TRL is not needed here."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from launch.command_line import StageFailed
from launch.experiments import dpo_speed as benchmark
from launch.experiments.dpo_speed import (
    BenchmarkRecipe,
    Measurement,
    compare,
    make_inputs,
    markdown,
    measure_ours,
)

TINY = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def recipe(**changes) -> BenchmarkRecipe:
    settings = {
        "architecture": TINY,
        "prompt_lengths": [20, 30],
        "response_length": 12.0,
        "batch_size": 8,
        "microbatch_size": 4,
        "num_steps": 3,
        "warmup_steps": 1,
        "num_threads": 1,
    }
    return BenchmarkRecipe(**{**settings, **changes})


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pairs_have_the_shape_of_the_recipe(tmp_path):
    shape = recipe(prompt_lengths=[256, 300], response_length=34.0, num_steps=10, batch_size=16)
    num_parameters = make_inputs(shape, tmp_path)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert num_parameters == sum(p.numel() for p in policy.parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    train = lines_of(tmp_path / "pairs" / "train.jsonl")
    in_order = lines_of(tmp_path / "pairs_in_order.jsonl")
    assert len(train) == 160 and sorted(map(str, train)) == sorted(map(str, in_order)) and train != in_order
    prompts = [len(tokenizer(row["prompt"]).input_ids) for row in train]
    # One more for the stop token, which both trainers append.
    responses = [len(tokenizer(row[side]).input_ids) + 1 for row in train for side in ("chosen", "rejected")]
    assert min(prompts) >= 256 and max(prompts) <= 300 and max(prompts) - min(prompts) > 35
    assert abs(sum(responses) / len(responses) - 34) < 1.5 and 8 <= min(responses) < max(responses) <= 68
    for row in train[:5]:
        joint = tokenizer(row["prompt"] + row["chosen"]).input_ids
        assert joint == tokenizer(row["prompt"]).input_ids + tokenizer(row["chosen"]).input_ids


def test_our_side_is_a_run_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    make_inputs(recipe(), tmp_path / "inputs")
    ours = measure_ours(recipe(), tmp_path, "no", 0)
    assert len(ours.seconds) == len(ours.losses) == 3 and min(ours.seconds) > 0
    assert ours.losses[0] == pytest.approx(0.693147, abs=1e-4), "the policy is its own reference at first"
    assert ours.losses[1] != ours.losses[0]
    assert 0.1 < ours.peak_memory_gib < 8
    settings = (tmp_path / "ours_no_0.yaml").read_text()
    assert "share_prompts: true" in settings and "cache_dir" not in settings


SLOW = Measurement([9.0, 4.0, 4.0], [0.69, 0.68, 0.67], 2.0)
FAST = Measurement([9.0, 1.0, 3.0], [0.69, 0.68, 0.67], 1.0)


def test_rates_leave_out_the_warm_up():
    assert SLOW.pairs_per_second(recipe()) == pytest.approx(2 * 8 / 8)
    assert FAST.pairs_per_second(recipe()) == pytest.approx(2 * 8 / 4)


def test_the_table_has_medians_and_the_range_of_paired_ratios():
    slower = Measurement([9.0, 8.0, 8.0], [0.69, 0.68, 0.6701], 4.0)
    row = compare(recipe(), "no", [(FAST, SLOW), (FAST, slower), (SLOW, SLOW)])
    assert row["ratio"] == pytest.approx([2.0, 4.0, 1.0])
    assert row["loss_difference"] == pytest.approx(1e-4)
    table = markdown([row])
    assert "| float32 | 4.00 | 2.00 | 2.00 (1.00 to 4.00) | 1.00 / 2.00 | 1.0e-04 |" in table


def test_unequal_work_has_no_ratio():
    other = Measurement(SLOW.seconds, [0.69, 0.68, 0.60], 2.0)
    with pytest.raises(ConfigError, match="differ by up to 0.07"):
        compare(recipe(), "no", [(FAST, other)])
    shorter = Measurement(SLOW.seconds, [0.69, 0.68], 2.0)
    with pytest.raises(ValueError):
        compare(recipe(), "no", [(FAST, shorter)])


def test_a_failed_process_names_its_log(tmp_path):
    with pytest.raises(StageFailed, match="code 3; see .*log"):
        benchmark.call(2, ["-c", "import sys; sys.exit(3)"], tmp_path / "a.log")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.getcwd())"
    benchmark.call(5, ["-c", code], tmp_path / "b.log", tmp_path)
    assert (tmp_path / "b.log").read_text() == f"5 {tmp_path}\n"


@pytest.mark.parametrize("installed", [None, "1.12.0"])
def test_another_trl_is_refused_in_one_message(installed, tmp_path, monkeypatch):
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match=r"expected TRL 1.16, got: .*pip install -e '.\[bench\]'"):
        benchmark.run(recipe(run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_benchmark_needs_a_model():
    with pytest.raises(ConfigError, match="architecture.model_type"):
        benchmark.run(BenchmarkRecipe())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_lengths": [30, 20]}, "prompt_lengths"),
        ({"response_length": 2.0}, "response_length"),
        ({"microbatch_size": 3}, r"^batch_size \(8\) must be a multiple of microbatch_size \(3\)"),
        ({"warmup_steps": 3}, "warmup_steps"),
        ({"num_repeats": 0}, "num_repeats"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        recipe(**change)
