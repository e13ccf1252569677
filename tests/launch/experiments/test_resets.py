"""The experiment over ways to reset: what runs from what, and its numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import plain, run, write_recipe

from drpo.config import ConfigError, load_recipe, replaced
from launch.command_line import StageFailed
from launch.experiments import resets, seed_grid
from launch.experiments.resets import (
    Curve,
    ResetsRecipe,
    markdown,
    read_curve,
    summary,
    until,
)

EPISODES = [0, 64, 128]
SLOW = [
    Curve(EPISODES, [0, 1000, 2000], [-1.0, 1.0, 3.0], 5.0),
    Curve(EPISODES, [0, 1000, 2000], [-1.0, 0.0, 1.0], 6.0),
]
FAST = [
    Curve(EPISODES, [0, 600, 1600], [-1.0, 3.5, 3.0], 4.0),
    Curve(EPISODES, [0, 400, 800], [-1.0, 0.0, 0.5], 4.0),
]


def write_metrics(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    write_recipe(folder / "config.yaml", {"rollout": {"batch_size": 16}, "ppo": {"num_minibatches": 2}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_curve_counts_episodes_and_all_tokens_that_were_sampled(tmp_path):
    rows = [
        {"step": 0, "eval/true_reward": -1.0, "eval/kl": 0.0},
        {"step": 1, "objective/sampled_tokens": 10.0, "vine/sampled_tokens": 30.0},
        {"step": 2, "objective/sampled_tokens": 12.0, "eval/true_reward": 0.5, "eval/kl": 2.0},
        {"step": 3, "objective/sampled_tokens": 8.0, "reset/initial_tokens": 5.0},
        {"step": 4, "objective/sampled_tokens": 1.0, "eval/true_reward": 2.5, "eval/kl": 3.0},
    ]
    assert read_curve(write_metrics(tmp_path / "run", rows)) == Curve(
        [0, 32, 64], [0, 52, 66], [-1.0, 0.5, 2.5], 3.0
    )


def test_a_run_without_evaluations_is_an_error(tmp_path):
    folder = write_metrics(tmp_path / "run", [{"step": 1, "objective/sampled_tokens": 1.0}])
    with pytest.raises(StageFailed, match=r"run/metrics.jsonl has no eval/true_reward"):
        read_curve(folder)


def test_what_is_sampled_until_a_reward_is_that_of_the_first_evaluation_that_has_it():
    curve, rewards = FAST[0], (-1.0, 3.0, 3.5, 4.0)
    assert [until(curve, reward, curve.tokens) for reward in rewards] == [0, 600, 600, None]
    assert [until(curve, reward, curve.episodes) for reward in rewards] == [0, 64, 64, None]


def test_the_summary_by_hand():
    found = summary(0.1, "fast", FAST, SLOW, through=0.7)
    assert (found["reward"], found["gain"], found["num_through"]) == ([3.0, 0.5], [0.0, -0.5], 1)
    # 3.0 of the other's first seed is there after 600 of its 2000 tokens, 1.0 of its second never
    assert found["share_of_baseline_tokens"] == [0.3, None]
    assert found["tokens_until_through"] == [600, None]
    assert found["episodes_until_through"] == [64, None]
    # the baseline's second seed has not got through: its final reward says nothing
    assert summary(0.1, "fast", FAST, SLOW, through=2.0)["share_of_baseline_tokens"] == [0.3]
    assert summary(0.1, "slow", SLOW, SLOW, through=1.0)["num_through"] == 2


def test_the_table_by_hand():
    """Half-widths: t(0.975; 1) = 12.706 times the standard error, which for 3 and 0.5 is 1.25: 15.88."""
    rows = [summary(0.1, "slow", SLOW, SLOW, 0.7), summary(0.1, "fast", FAST, SLOW, 0.7)]
    table = [line.strip("| ").split(" | ") for line in markdown(rows, "slow").splitlines()]
    assert table[0][1:5] == ["method", "SFT true reward", "true reward", "gain over slow"]
    assert table[2][:6] == ["0.1", "slow", "-1.00 ± 0.00", "2.00 ± 12.71", "-", "5.50 ± 6.35"]
    assert table[2][6:8] == ["2.0k", "2 of 2"]
    assert table[2][8:] == [
        "96 (64 to 128), 2 of 2",
        "1.5k (1.0k to 2.0k), 2 of 2",
        "1.00 (1.00 to 1.00), 2 of 2",
    ]
    assert table[3][2:6] == ["-1.00 ± 0.00", "1.75 ± 15.88", "-0.25 ± 3.18", "4.00 ± 0.00"]
    assert table[3][6:8] == ["1.2k", "1 of 2"]
    assert table[3][8:] == [
        "64 (64 to 64), 1 of 2",
        "0.6k (0.6k to 0.6k), 1 of 2",
        "0.30 (0.30 to 0.30), 1 of 2",
    ]


@pytest.mark.parametrize("reward", ["true", "learned"])
def test_methods_of_a_seed_share_policy_data_and_reward(tmp_path, monkeypatch, reward):
    runs: dict[str, tuple[str, str, list[str]]] = {}

    def launch_once(script, recipe, folder, overrides, num_jobs):
        runs[folder.name] = (script, recipe, overrides)

    monkeypatch.setattr(seed_grid, "launch_once", launch_once)
    monkeypatch.setattr(resets, "read_curve", lambda folder: SLOW[0])
    root = tmp_path / "runs"
    methods = {"DR-PO": ["demo/drpo.yaml"], "PPO++": ["demo/ppo_pp.yaml", "kl.coef=0.1"]}
    recipe = ResetsRecipe(
        run_dir=str(root),
        seeds=[0, 3],
        completion_rates=[0.01],
        methods=methods,
        reward=reward,
        online=["seed=9"],
    )
    resets.run(recipe)
    is_learned = reward == "learned"
    assert len(runs) == 2 * (3 + is_learned)
    data = ["seed=3", "data.demo.seed=3"]
    start = f"model.path={root}/sft_0.01_3/policy"
    assert runs["sft_0.01_3"] == ("sft", "demo/sft.yaml", [*data, "data.demo.completion_rate=0.01"])
    script, name, overrides = runs["ppo_pp_0.01_3"]
    assert (script, name) == ("drpo", "demo/ppo_pp.yaml")
    assert overrides[:4] == [*data, "data.demo.completion_rate=0.01", start]
    assert overrides[-3:] == ["eval.every=4", "kl.coef=0.1", "seed=9"]
    if is_learned:
        assert overrides[4:-3] == [f"reward.path={root}/reward_model_0.01_3/reward_model"]
        assert runs["reward_model_0.01_3"] == ("reward_model", "demo/reward_model.yaml", [*data, start])
    else:
        assert overrides[4:-3] == list(resets.TRUE_REWARD)
    assert (root / "results.png").stat().st_size > 0
    asked = replaced(recipe, questions={"Who else?": ["PPO++", "DR-PO"], "who": ["DR-PO"]})
    text = resets.run(asked).read_text()
    assert text.count("| 0.01 | DR-PO |") == 1 and text.count("| 0.01 | PPO++ |") == 1
    assert "## Who else?" in text and "## who\n" not in text  # which is about the baseline alone
    assert (root / "results_who_else.png").exists() and not (root / "results_who.png").exists()
    runs.clear()
    resets.run(replaced(recipe, only=["DR-PO"]))
    assert len(runs) == 2 * (2 + is_learned) and "ppo_pp_0.01_3" not in runs
    text = resets.run(replaced(asked, only=["PPO++"], baseline="PPO++")).read_text()
    assert "## Who else?" in text and "## who\n" not in text


@pytest.mark.parametrize(
    "override, message",
    [
        ("baseline=ORPO", r"baseline \(ORPO\) must be one of PPO, DR-PO"),
        ("only=[PPO,RLOO]", "only names RLOO, and methods are PPO, DR-PO"),
        ("questions={Why: [GAE]}", "questions.Why names GAE, and methods are PPO, DR-PO"),
        ("questions={Why: [DR-PO]}", "questions must have PPO in one of them, or its results are not shown"),
        ("only=[PPO]", r"baseline \(DR-PO\) must be one of PPO"),
        ("seeds=[0]", "seeds must be two or more"),
        (
            "methods={A b: [demo/drpo.yaml], a-B: [demo/ppo.yaml]}",
            r"methods.A b has the folder of another run, a_b",
        ),
        ("methods={sft: [demo/drpo.yaml]}", r"methods.sft has the folder of another run, sft"),
        ("methods={X: []}", "methods.X must begin with a recipe"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(ResetsRecipe, None, [override])


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["true", "learned"])
def test_the_whole_experiment_on_tiny_runs(tmp_path, reward):
    methods = {name: [f"demo/{name}.yaml"] for name in ("drpo", "drpo_adaptive", "rrpo", "uft", "vineppo")}
    recipe = {"run_dir": "grid", "methods": methods, "baseline": "drpo", "reward": reward, "seeds": [0, 1]}
    write_recipe(tmp_path / "grid.yaml", {**recipe, "completion_rates": [0.2]})
    tiny = "data.demo.num_train=64,data.demo.num_eval=8,num_steps=2"
    model = "model.architecture.hidden_size=16,model.architecture.intermediate_size=16"
    lists = [
        f"sft=[{tiny},optim.warmup_steps=0,{model},batch.size=8,batch.microbatch_size=8,sample.num_prompts=4]",
        f"reward_model=[{tiny},optim.warmup_steps=0,score.num_references=8]",
        f"online=[{tiny},rollout.batch_size=8,eval.num_prompts=4,eval.every=1]",
    ]
    printed = run(plain("experiments/resets"), "grid.yaml", *lists, "through=-9", cwd=tmp_path)
    assert "| 0.2 | vineppo | " in printed
    assert {path.name for path in Path(tmp_path / "grid").glob("results.*")} == {
        "results.json",
        "results.md",
        "results.png",
    }
