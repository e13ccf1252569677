"""The experiment on reward models: what is trained and evaluated on what, and its table by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_runs import plain, run

from drpo.config import ConfigError, load_recipe
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from launch.command_line import find_recipe
from launch.experiments import reward_models, seed_grid
from launch.experiments.reward_models import RewardModelsRecipe, check, markdown, prompt_accuracies

VARIANTS = {"pairs": ["num_steps=20"], "by prompt": ["loss.by=prompt"]}


def test_variants_of_a_seed_start_from_its_policy_and_are_evaluated_together(tmp_path, monkeypatch):
    runs: dict[str, tuple[str, list[str]]] = {}

    def launch_once(script, recipe, folder, overrides, jobs):
        runs[folder.name] = (script, overrides)
        if script == "evaluate_reward_model":
            folder.mkdir()
            (folder / "evaluation.json").write_text(json.dumps({"data": {"pairs_sha256": "of all variants"}}))

    monkeypatch.setattr(seed_grid, "launch_once", launch_once)
    monkeypatch.setattr(reward_models, "summary", lambda *_: {})
    monkeypatch.setattr(reward_models, "markdown", lambda _: "")
    monkeypatch.setattr(reward_models, "_plot", lambda *_: None)
    root = tmp_path / "grid"
    reward_models.run(
        RewardModelsRecipe(
            run_dir=str(root),
            sft="tldr/smoke_sft.yaml",
            recipe="tldr/smoke_reward_model.yaml",
            data_path="axis.jsonl",
            shared=["data.train_split=train"],
            variants=VARIANTS,
            seeds=[0, 3],
        )
    )
    data = ["data.train_split=train", "data.path=axis.jsonl"]
    assert runs["sft_3"] == ("sft", ["seed=3", *data])
    assert runs["pairs_3"] == (
        "reward_model",
        ["seed=3", *data, f"model.path={root}/sft_3/policy", "num_steps=20"],
    )
    assert runs["by_prompt_0"][1][-2:] == [f"model.path={root}/sft_0/policy", "loss.by=prompt"]
    assert runs["evaluation_by_prompt"] == ("evaluate_reward_model", [])
    assert len(runs) == 2 + 2 * (2 + 1)
    evaluation = load_recipe(EvaluateRewardModelRecipe, root / "evaluation_by_prompt.yaml", [])
    assert [model.path for model in evaluation.models] == [
        f"{root}/by_prompt_{seed}/reward_model" for seed in (0, 3)
    ]
    assert (evaluation.data.path, evaluation.data.train_split, evaluation.split) == (
        "axis.jsonl",
        "train",
        "eval",
    )
    trained = yaml.safe_load(find_recipe("tldr/smoke_reward_model.yaml").read_text())["data"]
    assert evaluation.data.eval_fraction == trained["eval_fraction"], "what was held out is what is evaluated"
    assert [ensemble.combine for ensemble in evaluation.ensembles] == ["mean", "min", "mean_minus_std"]


def test_accuracies_by_prompt_by_hand(tmp_path):
    """Prompt a: right and tied, 3/4, then wrong and right, 1/2; prompt b: wrong, then right."""
    scores = [("a", (2, 1), (0, 1)), ("b", (0, 5), (1, 0)), ("a", (1, 1), (3, 2))]
    lines = [
        {
            "prompt_id": prompt,
            "models": {f"seed {s}": {"chosen": c, "rejected": r} for s, (c, r) in enumerate(pairs)},
        }
        for prompt, *pairs in scores
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prompt_accuracies(tmp_path, [0, 1]).tolist() == [[0.75, 0.0], [0.5, 1.0]]


def result(name: str, difference: dict | None, temperature: list) -> dict:
    limits = {"value": 0.7, "low": 0.6, "high": 0.8}
    return {
        "variant": name,
        "num_pairs": 9,
        "num_prompts": 4,
        "accuracy": limits,
        "difference": difference,
        "ece": [0.1, 0.1],
        "log_loss": [0.5, 0.7],
        "temperature": temperature,
        "partial_correlation": [0.2, 0.2],
        "length_judge": limits | {"value": 0.61},
        "steps": [20, 20],
        "minutes": [1.0, 1.0],
        "ensembles": [
            {"name": "mean of all", "accuracy": limits, "gain": limits | {"value": 0.01, "low": -0.1}}
        ],
    }


def test_the_table_by_hand():
    """Log losses 0.5 and 0.7: mean 0.6, half-width t(0.975; 1) = 12.706 times the standard error 0.1."""
    difference = {"difference": -0.02, "low": -0.1, "high": 0.05}
    rows = markdown(
        [result("pairs", None, [1.0, 1.0]), result("by prompt", difference, [None, 2.0])]
    ).splitlines()
    assert rows[0].startswith("| reward model | accuracy | less pairs | ECE |")
    assert rows[2].startswith(
        "| pairs | 0.700 [0.600, 0.800] | - | 0.100 ± 0.000 | 0.600 ± 1.271 | 1.000 ± 0.000 |"
    )
    assert "| -0.020 [-0.100, 0.050] |" in rows[3] and "| none in 1 of 2 seeds |" in rows[3]
    assert "9 held-out pairs of 4 prompts" in rows[5] and "0.610 [0.600, 0.800]" in rows[5]
    assert rows[-1] == "| by prompt: mean of all | 0.700 [0.600, 0.800] | 0.010 [-0.100, 0.800] |"


def test_variants_may_have_noise_of_their_own():
    check(load_recipe(RewardModelsRecipe, None, ["variants={noisy: [data.noise.flip_rate=0.2]}"]))


@pytest.mark.parametrize(
    "override, message",
    [
        ("variants={}", "variants is empty"),
        ("variants={a: [data.limit=3]}", "variants.a: data.limit=3 belongs in shared"),
        ("variants={a: [seed=3]}", "variants.a: seed=3 belongs in shared, seeds or run_dir"),
        ("variants={a: [loss.unknown=3]}", "variants.a: .*unknown"),
        ("variants={a: [run_dir=x]}", "variants.a: run_dir=x belongs in shared, seeds or run_dir"),
        ("variants={a b: [], a_b: []}", "variants need different folders"),
        ("variants={sft: []}", "variants need different folders, and two have .'sft_0'"),
        (
            "variants={b_0: [], evaluation_b: []}",
            "variants need different folders, and two have .'evaluation_b_0'",
        ),
        ("seeds=[1]", "seeds must be two or more different numbers"),
        ("shared=[num_steps=3]", "shared is for the data alone"),
    ],
)
def test_a_grid_that_shows_nothing_or_fails_late_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        check(load_recipe(RewardModelsRecipe, None, [override]))


def test_variants_on_other_pairs_are_refused_and_equal_ones_have_no_difference():
    evaluations = {
        name: {"data": {"pairs_sha256": pairs}} for name, pairs in (("pairs", "x"), ("by prompt", "y"))
    }
    with pytest.raises(
        ConfigError, match="variants.by prompt: its tokenizer leaves other pairs than that of pairs"
    ):
        reward_models._check_same_pairs(evaluations)
    assert reward_models.difference(np.ones((2, 5)), np.ones((2, 5))) is None
    assert reward_models.difference(np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])) is None
    rng = np.random.default_rng(0)
    assert (
        abs(reward_models.difference(rng.random((2, 50)) + 0.0, np.ones((2, 50)))["difference"] + 0.5) < 0.1
    )


@pytest.mark.slow
def test_the_whole_experiment_on_tiny_runs(tmp_path):
    rows = [
        {"post": f"post {i} needs a tent", "summaries": [" tent", " mug", f" post {i}"], "overall": [5, 2, 3]}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = "num_steps=2, optim.warmup_steps=0, eval.every=0"
    (tmp_path / "sft.yaml").write_text(
        find_recipe("tldr/smoke_sft.yaml")
        .read_text()
        .replace("num_steps: 120", "num_steps: 12")
        .replace("2048", "300")
    )
    (tmp_path / "grid.yaml").write_text(
        "sft: sft.yaml\nrecipe: tldr/smoke_reward_model.yaml\nshared: [data.subset=null, data.train_split=train]\n"
        f"seeds: [0, 1]\nvariants:\n  pairs: [{tiny}]\n  ranked: [{tiny}, loss.name=plackett_luce]\n"
    )
    command = [*plain("experiments/reward_models"), "grid.yaml", "data_path=rows.jsonl", "run_dir=grid"]
    for _ in range(2):  # the second time everything is there already
        assert "| ranked |" in run(command, cwd=tmp_path)
    results = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert [found["variant"] for found in results] == ["pairs", "ranked"]
    assert all(np.isfinite(found["accuracy"]["value"]) for found in results)
    assert (tmp_path / "grid" / "results.png").stat().st_size > 0
    assert Path(tmp_path / "grid" / "evaluation_ranked" / "evaluation.html").exists()
