"""The experiment on a pretrained policy: what it checks before hours of training, and what runs from what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from drpo.config import ConfigError, load_recipe
from launch.command_line import StageFailed, find_recipe
from launch.experiments import seed_grid
from launch.experiments import smollm as smollm_experiment
from launch.experiments.smollm import SmolLMExperimentRecipe, StageConfig, run

RECIPE = load_recipe(SmolLMExperimentRecipe, find_recipe("smollm/seeds_tldr.yaml"), [])


def write_posts(path: Path, numbers: range) -> str:
    rows = [{"post": f"post {n}", "summaries": [" a", " b"], "overall": [1, 2]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path) -> SmolLMExperimentRecipe:
    return replace(
        RECIPE,
        run_dir=str(tmp_path / "runs"),
        data_path=write_posts(tmp_path / "posts.jsonl", range(6)),
        judge_data_path=write_posts(tmp_path / "judge.jsonl", range(6, 9)),
    )


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, str, list[str]]]:
    """What would have run: script, folder, overrides."""
    runs: list[tuple[str, str, list[str]]] = []

    def launch_once(script, recipe, folder, overrides, num_jobs):
        runs.append((script, folder.name, overrides))

    monkeypatch.setattr(seed_grid, "launch_once", launch_once)
    monkeypatch.setattr(smollm_experiment, "compare", lambda recipe, root: root / "report.html")
    return runs


def test_each_run_starts_from_the_sft_policy_of_its_seed_and_what_it_needs_came_before(recipe, launched):
    run(recipe)
    names = [name for _, name, _ in launched]
    methods = ("DPO", "Dr._DPO", "PPO", "DR_PO_1", "DR_PO_0.5")
    assert sorted(names) == sorted(
        ["reward_model", "judge", *(f"{name}_{seed}" for name in ("sft", *methods) for seed in (0, 1, 2))]
    )
    for script, name, overrides in launched:
        given = dict(override.split("=", 1) for override in overrides)
        assert given["data.path"].endswith("judge.jsonl" if name == "judge" else "posts.jsonl")
        assert given["data.eval_fraction"] == "0.35"
        if script == "sft":
            continue
        seed = {"reward_model": "0", "judge": "1"}.get(name, name[-1])
        assert given["seed"] == seed and given["model.path"].endswith(f"sft_{seed}/policy")
        assert names.index(f"sft_{seed}") < names.index(name)
        online = script in ("ppo", "drpo")
        assert ("reward.path" in given) == online == ("critic.path" in given)
        assert not online or given["reward.path"].endswith("reward_model/reward_model")


def test_settings_of_all_online_methods_come_before_a_method_s_own(recipe, launched):
    """And a method whose recipe gives its critic no path, or that has none, is given none."""
    online = ["num_steps=9", "critic.path=null", "rollout.rollouts_per_prompt=2", "advantage.estimator=rloo"]
    own = replace(RECIPE.methods["PPO"], overrides=["num_steps=7", "advantage.estimator=gae"])
    methods = {"DPO": RECIPE.methods["DPO"], "RLOO": replace(own, overrides=["num_steps=8"]), "PPO": own}
    run(replace(recipe, methods=methods, online=online))
    given = {name: overrides for _, name, overrides in launched}
    assert given["RLOO_0"][2:-4] == [*online, "num_steps=8"] == given["RLOO_2"][2:-4]
    assert given["PPO_1"][2:-4] == [*online, *own.overrides]
    assert not any(setting in given[name] for name in ("DPO_0", "sft_0", "judge") for setting in online)
    assert all("reward.path" in given[name][-1] for name in ("RLOO_0", "PPO_0"))


def test_the_methods_of_the_grid_of_resets_are_told_apart_by_their_own_settings(recipe, launched):
    resets = load_recipe(SmolLMExperimentRecipe, find_recipe("smollm/resets_seeds_tldr.yaml"), [])
    run(
        replace(
            resets, run_dir=recipe.run_dir, data_path=recipe.data_path, judge_data_path=recipe.judge_data_path
        )
    )
    assert len(launched) == 3 * 11 + 2
    assert not any(
        o.startswith("critic.path=") and "reward_model" in o for *_, given in launched for o in given
    )


def test_some_of_the_methods_may_be_run_and_compared_alone(recipe, launched, monkeypatch):
    compared = []
    monkeypatch.setattr(smollm_experiment, "compare", lambda recipe, root: compared.extend(recipe.shown))
    run(replace(recipe, only=["DR-PO 1", "PPO"]))
    names = {name for _, name, _ in launched}
    assert {name for name in names if name.endswith("_2")} == {"sft_2", "PPO_2", "DR_PO_1_2"}
    assert compared == ["PPO", "DR-PO 1"]
    with pytest.raises(ConfigError, match="^only names DR-PO, and methods are DPO, Dr. DPO, PPO, DR-PO 1"):
        replace(recipe, only=["DR-PO"])


def test_a_failed_stage_ends_it_and_runs_nothing_that_needs_it(recipe, monkeypatch):
    runs = []

    def launch_once(script, recipe, folder, overrides, num_jobs):
        runs.append(folder.name)
        if folder.name == "sft_0":
            raise StageFailed("sft_0 failed; see its log")

    monkeypatch.setattr(seed_grid, "launch_once", launch_once)
    with pytest.raises(StageFailed, match="sft_0 failed"):
        run(replace(recipe, num_jobs=1))
    assert "reward_model" not in runs and not any(name.endswith("PO_0") for name in runs)


def stage(**changes) -> StageConfig:
    return replace(RECIPE.methods["DPO"], **changes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data_path": None}, "data_path and judge_data_path: give a file each"),
        ({"data_path": "/no/posts.jsonl"}, "no file or folder"),
        ({"methods": {"DPO": stage(recipe="smollm/none.yaml")}}, "methods.DPO: no recipe smollm/none.yaml"),
        ({"methods": {"DPO": stage(script="dppo")}}, "methods.DPO.script must be one of .*dpo.*got 'dppo'"),
        ({"methods": {"DPO": stage(overrides=["nokey"])}}, "methods.DPO: 'nokey' is not an override"),
        ({"methods": {"DPO": stage(overrides=["no.key=1"])}}, "methods.DPO: no"),
        ({"methods": {}}, "methods is empty; give at least one"),
        ({"reward_model": StageConfig()}, "reward_model.script must be one of"),
        ({"methods": {"sft": stage()}}, "methods must not have two runs in one folder, sft"),
        (
            {"methods": {"D PO": stage(), "D-PO": stage()}},
            "methods must not have two runs in one folder, D_PO",
        ),
        (
            {"methods": {"DPO": stage(overrides=["data.eval_fraction=0.2"])}},
            "methods.DPO.overrides: data.eval_fraction=0.2 belongs in shared",
        ),
        ({"online": ["data.eval_fraction=0.1"]}, "online: data.eval_fraction=0.1 belongs in shared"),
        ({"sft": StageConfig("sftx", "smollm/tldr_sft.yaml")}, "sft.script must be one of .*got 'sftx'"),
        ({"compare": replace(RECIPE.compare, recipe="none.yaml")}, "compare: no recipe none.yaml"),
        (
            {
                "compare": replace(
                    RECIPE.compare,
                    overrides=[
                        "judging.judge.kind=openai",
                        "judging.judge.path=null",
                        "judging.judge.model=m",
                        "judging.prompt=tldr-1",
                    ],
                )
            },
            "judging.judge.kind must be reward_model",
        ),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(recipe, launched, change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        run(replace(recipe, **change))
    assert launched == []


def test_the_judge_must_not_have_seen_a_post_of_the_experiment(recipe, launched, tmp_path):
    """Also when the row around it differs."""
    path = write_posts(tmp_path / "judge.jsonl", range(5, 9))
    rows = [json.loads(line) | {"overall": [5, 4]} for line in Path(path).read_text().splitlines()]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"1 of its prompts are in data_path too, such as .*judge.jsonl:1"):
        run(recipe)
    assert launched == []


def test_curves_are_those_of_each_run_and_of_what_it_measured(tmp_path):
    for name, scores in {"a": [1.0, 2.0], "b": [3.0]}.items():
        (tmp_path / name).mkdir()
        rows = [{"step": i, "objective/score": score, "time/step": 9.0} for i, score in enumerate(scores)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = smollm_experiment.training_curves([tmp_path / "a", tmp_path / "b"])
    assert found == {"objective/score": [[1.0, 2.0], [3.0]]}


def test_training_is_plotted_over_the_tokens_of_the_rollouts(tmp_path):
    online = {
        "objective/score": [[1.0, 2.0], [3.0, 5.0]],
        "objective/sampled_tokens": [[500.0, 250.0], [1000.0, 0.0]],
    }
    training = {"SFT": {"train/loss": [[1.0]]}, "PPO": online}
    ((name, (tokens, scores)),) = smollm_experiment.scores_by_tokens(training).items()
    assert (name, tokens.tolist()) == ("PPO", [[500, 750], [1000, 1000]])
    assert scores == online["objective/score"]
    smollm_experiment.plot_training(training, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 0
    smollm_experiment.plot_training({"SFT": training["SFT"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
