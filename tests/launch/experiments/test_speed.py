"""The speed benchmark: its inputs, its arithmetic, what it refuses, and small runs of it."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from shipped_recipes import STAGES
from tiny_runs import ROOT, run, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError, load_recipe
from launch.command_line import StageFailed, call
from launch.experiments import speed
from launch.experiments.flops import Shape
from launch.experiments.speed import SpeedRecipe, flops_of
from launch.experiments.speed_cases import CASES, Case, our_settings, work
from launch.experiments.speed_inputs import make_models, make_texts
from launch.experiments.speed_table import Measurement, Scale, compare, markdown
from launch.experiments.speed_tools import checkout, environment_with_trl

TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 300,
    "prompt_length": 24,
    "response_length": 8,
    "batch_size": 4,
    "microbatch_size": 2,
    "num_epochs": 1,
    "num_steps": 2,
    "num_repeats": 1,
    "num_threads": 1,
}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lengths_of(rows: list[dict], key: str) -> np.ndarray:
    return np.array([len(row[key].split()) for row in rows])


# --- inputs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder, vocabulary=300, prompt_length=256, response_length=53, num_rows=400, seed=0)
    return folder


def test_even_rows_have_one_length(texts):
    rows = rows_of(texts / "even_pairs.jsonl")
    assert set(lengths_of(rows, "prompt")) == {256}
    # The stop token makes 53.
    assert set(lengths_of(rows, "chosen")) == set(lengths_of(rows, "rejected")) == {52}


@pytest.mark.parametrize(
    ("name", "prompts", "responses"), [("tldr", (256, 512), (34, 53)), ("chat", (256, 2048), (212, 1007))]
)
def test_uneven_rows_have_median_and_limit_of_their_kind(texts, name, prompts, responses):
    rows = rows_of(texts / f"{name}_demonstrations.jsonl")
    for key, (median, longest), extra in (("prompt", prompts, 0), ("completion", responses, 1)):
        lengths = lengths_of(rows, key) + extra
        assert np.median(lengths) == pytest.approx(median, rel=0.15)
        assert 20 <= lengths.min() < 0.7 * median and 1.3 * median < lengths.max() <= longest


def test_rows_in_order_are_those_of_the_file_in_another_order(texts):
    rows, in_order = rows_of(texts / "chat_pairs.jsonl"), rows_of(texts / "chat_pairs_in_order.jsonl")
    assert rows != in_order and sorted(map(str, rows)) == sorted(map(str, in_order))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("models")
    return folder, make_models(folder, Shape(64, 2, 128, 300), num_heads=2, positions=128, seed=0)


def test_words_are_tokens_and_weights_are_counted(models):
    folder, num_weights = models
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    assert tokenizer("w3 w0 w297").input_ids == [3, 0, 297] and tokenizer.eos_token_id == 298
    # Two matrices of the vocabulary; 12 matrices of the width a layer, in effect 4 + 2 * 2, with biases and norms.
    matrices = 2 * 300 * 64 + 2 * 8 * 64**2
    assert matrices < num_weights < 1.02 * matrices


@pytest.mark.parametrize(("name", "lowest", "highest"), [("stops", 0.999, 1), ("never_stops", 0, 1e-6)])
def test_policy_ends_at_once_or_never(models, name, lowest, highest):
    policy = AutoModelForCausalLM.from_pretrained(models[0] / name)
    ids = torch.randint(0, 298, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stop = policy(ids).logits.softmax(dim=-1)[..., 298]
    assert lowest <= stop.min() and stop.max() <= highest


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name, case in CASES.items() for side in ("ours", *case.beside) if side != "trl"],
)
def test_settings_of_every_side_are_a_recipe_of_the_stage(tmp_path, name, side):
    case = CASES[name]
    settings = our_settings(case, SpeedRecipe(**TINY).sizes_of(case), tmp_path, side)
    if side == "before":
        settings.pop("score", None)  # its keys had other names
    recipe = load_recipe(STAGES[case.stage], write_recipe(tmp_path / "recipe.yaml", settings), [])
    assert recipe.model.trainable_layers == (2 if name == "reward_model_top" else None)
    rows = recipe.rollout if case.is_online else recipe.batch
    expected = {"ours": 1, "pairs": 6}[side] if case.ranked else 4 * case.num_batches
    assert (rows.batch_size if case.is_online else rows.size) == expected
    cut = recipe.ppo if case.is_online else recipe.batch
    assert (cut.microbatch_tokens is not None) == (case.lengths != "even" and side == "ours")
    if case.is_online:
        assert recipe.reset.proportion == (name in ("resets", "ppo_tldr", "ppo_chat") and side != "prompts")


# --- arithmetic ---------------------------------------------------------------------------------------------


def test_work_of_stages_by_hand():
    # Width 1, one layer, MLP of 1, one token of response: 2 * 6 + 4 + 2 * outputs a forward.
    shape, one = Shape(1, 1, 1, vocabulary=10), [(0, 1)]
    language, scalar = 16 + 20, 16 + 2

    def of(stage: str, part: str = "step", epochs: int = 1) -> float:
        return work(Case(stage, "even", ()), part, one, shape, epochs)

    assert of("sft") == 3 * language and of("dpo") == 4 * language and of("reward_model") == 3 * scalar
    update = 2 * 3 * (language + scalar)
    assert of("drpo", "update", 2) == update
    assert of("drpo", "learn", 2) == update + 2 * language + 2 * scalar
    assert of("drpo", "step", 2) == update + 3 * language + 2 * scalar


def test_work_counts_each_rollout_and_both_responses(tmp_path):
    recipe = SpeedRecipe(**{**TINY, "num_steps": 3})
    make_texts(tmp_path, 300, 24, 8, num_rows=48, seed=0)
    four = flops_of(recipe, CASES["ppo_4_per_prompt"], tmp_path)
    assert four["update"] == pytest.approx(flops_of(recipe, CASES["ppo"], tmp_path)["update"])
    assert flops_of(recipe, CASES["dpo"], tmp_path)["step"] == pytest.approx(
        4 / 3 * 2 * flops_of(recipe, CASES["sft"], tmp_path)["step"]
    )
    assert flops_of(recipe, CASES["resets"], tmp_path) == {}
    # A quarter of the prompts, each with the 2 x 6 rows of its pairs.
    pairs, ranked = (
        flops_of(recipe, CASES[f"reward_model{kind}"], tmp_path)["step"] for kind in ("", "_ranked")
    )
    assert ranked == pytest.approx(6 / 4 * pairs)


SCALE = Scale(warmup_steps=1, matmul_rate=100.0, loss_tolerance=1e-3)
SLOW = Measurement({"step": [9.0, 4.0, 4.0]}, [0.69, 0.68, 0.67], 2.0)
FAST = Measurement({"step": [9.0, 1.0, 3.0]}, [0.69, 0.68, 0.67], 1.0)


def test_ratios_are_of_one_round_without_warm_up():
    slower = Measurement({"step": [9.0, 8.0, 8.0]}, [0.69, 0.68, 0.6701], 4.0)
    rounds = {"ours": [FAST, FAST, SLOW], "trl": [SLOW, slower, SLOW]}
    (row,) = compare("dpo", CASES["dpo"], rounds, {"step": 100.0}, SCALE)
    assert row["ours"] == [2.0, 2.0, 4.0] and row["faster"] == pytest.approx([2.0, 4.0, 1.0])
    assert row["ours_of_peak"] == pytest.approx([0.5, 0.5, 0.25])
    assert row["memory"] == [0.5, 0.25, 1.0] and row["loss_difference"] == pytest.approx(1e-4)
    cells = (
        "| dpo | step | 2.00 | TRL | 4.00 | 2.00 (1.00 to 4.00) | 50% / 25% | 0.50 (0.25 to 1.00) | 1.0e-04 |"
    )
    assert cells in markdown([row])


def test_part_that_the_peer_does_not_time_has_no_ratio():
    ours = Measurement({"step": [1.0, 2.0], "learn": [1.0, 1.5], "update": [1.0, 1.0]}, [5.0], 1.0)
    peer = Measurement({"step": [1.0, 4.0], "learn": [1.0, 3.0]}, [], 1.0)
    rows = compare("ppo", CASES["ppo"], {"ours": [ours], "trl": [peer]}, {"update": 50.0}, SCALE)
    assert [row["faster"] for row in rows] == [[2.0], [2.0], None]
    assert rows[2]["ours_of_peak"] == [0.5] and rows[2]["other_of_peak"] is None
    assert "| ppo | update | 1.00 | TRL | - | - | 50% / - |" in markdown(rows)


@pytest.mark.parametrize("loss", [0.60, float("nan")])
def test_sides_with_different_losses_are_not_compared(loss):
    other = Measurement(SLOW.seconds, [0.69, 0.68, loss], 2.0)
    with pytest.raises(ConfigError, match="^dpo: the losses differ from those of TRL by up to"):
        compare("dpo", CASES["dpo"], {"ours": [FAST], "trl": [other]}, {}, SCALE)
    shorter = Measurement(SLOW.seconds, [0.69, 0.68], 2.0)
    with pytest.raises(ValueError):
        compare("dpo", CASES["dpo"], {"ours": [FAST], "trl": [shorter]}, {}, SCALE)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ["odd"]}, "^cases must be some of dpo, "),
        ({"cases": []}, "^cases must be some of dpo, "),
        ({"microbatch_size": 3}, r"^batch_size \(4\) must be a multiple of microbatch_size \(3\)"),
        ({"batch_size": 2}, r"^batch_size \(2\) must be a multiple of 4 for the case ppo_4_per_prompt"),
        ({"warmup_steps": 2}, r"^warmup_steps \(2\) must be below num_steps \(2\)"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SpeedRecipe(**{**TINY, **changes})


def test_cases_beside_a_missing_baseline_are_refused(tmp_path):
    recipe = SpeedRecipe(**TINY, run_dir=str(tmp_path), cases=["sft_chat"], baseline=None)
    with pytest.raises(ConfigError, match="baseline is null, and the cases"):
        speed.run(recipe)


@pytest.mark.parametrize("installed", [None, "1.12.0"])
def test_another_trl_is_refused_in_one_message(installed, tmp_path, monkeypatch):
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match=r"expected TRL 1.16, got: .*pip install -e '.\[bench\]'"):
        speed.run(SpeedRecipe(**TINY, run_dir=str(tmp_path / "run"), cases=["dpo"]))


def test_baseline_is_a_commit_or_a_checkout(tmp_path):
    assert checkout(str(ROOT), tmp_path / "before") == ROOT
    with pytest.raises(
        ConfigError, match="baseline: 'no-such-commit' is no folder, and git has no such commit"
    ):
        checkout("no-such-commit", tmp_path / "before")
    with pytest.raises(ConfigError, match="is no checkout, it has no launch/drpo.py"):
        checkout(str(tmp_path), tmp_path / "before")


def test_environment_that_cannot_be_made_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StageFailed, match="see .*trl_0.0.log"):
        environment_with_trl("0.0", "import trl", tmp_path)
    assert not (tmp_path / "trl_0.0" / "ready").exists()
    (tmp_path / "trl_0.0" / "ready").touch()
    assert environment_with_trl("0.0", "import trl", tmp_path) == tmp_path / "trl_0.0" / "bin" / "python"


def test_failed_process_names_its_log(tmp_path):
    with pytest.raises(StageFailed, match="code 3; see .*log"):
        call(2, ["-c", "import sys; sys.exit(3)"], tmp_path / "a.log")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.getcwd())"
    call(5, ["-c", code], tmp_path / "b.log", tmp_path)
    assert (tmp_path / "b.log").read_text() == f"5 {tmp_path}\n"


# --- runs ---------------------------------------------------------------------------------------------------


def measured(folder: Path, *cases: str, **changes) -> list[dict]:
    """The rows of a small run; two checkouts of one commit differ in nothing but the shape of micro-batches."""
    settings = [f"{key}={value}" for key, value in {**TINY, "baseline": str(ROOT), **changes}.items()]
    command = [sys.executable, str(ROOT / "launch" / "experiments" / "speed.py")]
    run(command, f"cases=[{','.join(cases)}]", f"run_dir={folder / 'speed'}", *settings, cwd=folder)
    result = json.loads((folder / "speed" / "results.json").read_text())
    assert result["recipe"]["prompt_length"] == 24 and min(result["matmul_flops"]) > 1e8
    assert (folder / "speed" / "results.md").read_text().count("\n| ") == 2 + len(result["rows"])
    return result["rows"]


@pytest.mark.slow
def test_uneven_rows_cut_by_tokens_are_compared_with_rows(tmp_path):
    (row,) = measured(tmp_path, "sft_chat")
    assert row["beside"] == "before" and row["loss_difference"] < 1e-5
    assert len(row["faster"]) == len(row["memory"]) == 1 and 0 < row["ours_of_peak"][0] < 1
    ours, before = (
        (tmp_path / "speed" / f"sft_chat_{side}_0.yaml").read_text() for side in ("ours", "before")
    )
    # 2 rows of 24 + 32 tokens, the medians.
    assert "microbatch_tokens: 112" in ours and "microbatch_tokens" not in before


@pytest.mark.slow
def test_losses_of_trl_are_ours(tmp_path):
    rows = measured(tmp_path, "dpo", "sft", "reward_model")
    assert [row["case"] for row in rows] == ["dpo", "sft", "reward_model"]
    for row in rows:
        assert row["beside"] == "trl" and row["loss_difference"] < 1e-5


@pytest.mark.slow
def test_online_cases_have_all_their_rows(tmp_path):
    cases = ["ppo_tldr", "ppo_chat", "reward_model_chat", "resets"]
    rows = measured(tmp_path, *cases)
    parts = ["learn", "update"] * 2 + ["step", "generate"]
    assert [row["part"] for row in rows] == parts
    for row in rows:
        assert row["case"] == "resets" or row["loss_difference"] < 1e-5
    assert rows[-1]["beside"] == "prompts" and rows[-1]["ours_of_peak"] is None
    # Lengths are those of the data, within the share that is forced.
    wanted = rows_of(tmp_path / "speed" / "inputs" / "chat_demonstrations_in_order.jsonl")[4:8]
    lengths = (tmp_path / "speed" / "ppo_chat_ours_0" / "metrics.jsonl").read_text().splitlines()
    mean = json.loads(lengths[-1])["objective/length"]
    assert mean == pytest.approx(np.mean(lengths_of(wanted, "completion") + 1), rel=0.06)
