"""The experiment on ensembles: what runs from what, and its numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import plain, run

from drpo.config import ConfigError, load_recipe
from launch.experiments import overoptimisation, seed_grid
from launch.experiments.overoptimisation import OverOptimisationRecipe, markdown, summary

CURVES = {
    ("single", 0): {"true": [-1.0, 3.0, 1.0], "proxy": [0.0, 1.0, 2.0], "kl": [0.0, 4.0, 9.0]},
    ("single", 1): {"true": [-1.0, 2.0, 0.0], "proxy": [0.0, 1.0, 4.0], "kl": [0.0, 4.0, 9.0]},
    ("min", 0): {"true": [-1.0, 2.0, 3.0], "proxy": [0.0, 0.5, 1.0], "kl": [0.0, 3.0, 5.0]},
    ("min", 1): {"true": [-1.0, 2.0, 2.0], "proxy": [0.0, 0.5, 1.0], "kl": [0.0, 3.0, 7.0]},
}


def test_the_summary_by_hand():
    single, lowest = (summary(name, [0, 1], CURVES) for name in ("single", "min"))
    assert (single["final"], single["best"], single["lost"]) == ([1.0, 0.0], [3.0, 2.0], [2.0, 2.0])
    assert single["gain_over_single"] == [0.0, 0.0]
    assert (lowest["lost"], lowest["gain_over_single"]) == ([0.0, 0.0], [2.0, 2.0])
    assert (lowest["proxy"], lowest["kl"]) == ([1.0, 1.0], [5.0, 7.0])


def test_the_table_has_a_row_a_reward_and_no_gain_of_single_over_itself():
    """Half-widths: t(0.975; 1) = 12.706 times the standard error, which for 0 and 1 is 0.5: 6.35."""
    table = markdown([summary(name, [0, 1], CURVES) for name in ("single", "min")]).splitlines()
    assert table[0].startswith("| reward | final true reward | gain over single | best true reward |")
    assert table[2].startswith("| single | 0.50 ± 6.35 | - | 2.50 ± 6.35 | 2.00 ± 0.00 |")
    assert table[3].startswith("| min | 2.50 ± 6.35 | 2.00 ± 0.00 | 2.50 ± 6.35 | 0.00 ± 0.00 |")


def test_members_differ_in_their_seed_alone_and_online_runs_in_their_reward(tmp_path, monkeypatch):
    runs: dict[str, tuple[str, list[str]]] = {}

    def launch_once(script, recipe, folder, overrides, num_jobs):
        runs[folder.name] = (script, overrides)

    monkeypatch.setattr(seed_grid, "launch_once", launch_once)
    monkeypatch.setattr(overoptimisation, "_curves", lambda root, name, seed: CURVES["min", 0])
    recipe = OverOptimisationRecipe(
        run_dir=str(tmp_path / "runs"),
        seeds=[0, 3],
        num_members=2,
        combinations=["single", "min", "mean_minus_std"],
    )
    overoptimisation.run(recipe)
    assert len(runs) == 2 * (1 + 2 + 3)
    root, data = tmp_path / "runs", "data.demo.seed=3"
    start = f"model.path={root}/sft_3/policy"
    for member in (0, 1):
        assert runs[f"reward_model_3_{member}"] == ("reward_model", [f"seed=300{member}", data, start])
    paths = [f"{root}/reward_model_3_{member}/reward_model" for member in (0, 1)]
    common, both = ["seed=3", data, start], f"reward.ensemble.paths=[{','.join(paths)}]"
    assert runs["online_single_3"] == ("drpo", [*common, f"reward.path={paths[0]}"])
    lowest = ["reward.path=null", both, "reward.ensemble.combine=min"]
    assert runs["online_min_3"] == ("drpo", [*common, *lowest])
    careful = ["reward.path=null", both, "reward.ensemble.combine=mean_minus_std", "reward.ensemble.coef=1.0"]
    assert runs["online_mean_minus_std_3"] == ("drpo", [*common, *careful])
    assert (root / "results.png").stat().st_size > 0


@pytest.mark.parametrize(
    "override, message",
    [
        ("combinations=[min]", "combinations must hold single"),
        ("combinations=[single,median]", "combinations are single, mean, .* got median"),
        ("combinations=[single,min,min]", "combinations names min twice"),
        ("seeds=[0]", "seeds must be two or more"),
        ("num_members=1", "num_members must be >= 2"),
    ],
)
def test_a_grid_that_shows_nothing_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(OverOptimisationRecipe, None, [override])


@pytest.mark.slow
def test_the_whole_experiment_on_tiny_runs(tmp_path):
    tiny = "data.demo.num_train=64,data.demo.num_eval=8,num_steps=2,optim.warmup_steps=0"
    model = "model.architecture.hidden_size=16,model.architecture.intermediate_size=16"
    command = [*plain("experiments/overoptimisation"), "demo/overoptimisation.yaml"]
    overrides = ["run_dir=grid", "seeds=[0,1]", "num_members=2", "combinations=[single,min]"]
    online = "rollout.batch_size=8,eval.every=1,eval.num_prompts=4"
    lists = [
        f"sft=[{tiny},{model},batch.size=8,batch.microbatch_size=8,sample.num_prompts=4]",
        f"reward_model=[{tiny},score.unit_variance=true,score.num_references=8]",
        f"online=[{tiny},{online}]",
    ]
    printed = run(command, *overrides, *lists, cwd=tmp_path)
    assert "| min | " in printed
    names = {path.name for path in Path(tmp_path / "grid").glob("results.*")}
    assert names == {"results.json", "results.md", "results.png"}
