"""Whole runs on rewards of several sources: what is logged, and what must not change a number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from offline_runs import run_reward_model, run_sft
from online_runs import RECIPE, merged, run_online
from tiny_runs import ONLINE, assert_close, ddp, metrics_of, partitioned, plain, run, write_recipe

from drpo.config import load_recipe
from drpo.engine import Engine, EngineConfig
from drpo.run.checkpoints import list_checkpoints
from drpo.run.metrics import reproducible
from drpo.trainers.online_recipe import OnlineRecipe
from reward_models.score import RewardModelScorer
from reward_models.sources import reward_from

MODELS = ["rm0/reward_model", "rm1/reward_model"]
PARTS = [
    {"name": "rm", "ensemble": {"paths": MODELS, "combine": "mean_minus_std", "coef": 0.5}, "weight": 2.0},
    {"name": "true", "function": "drpo.data.tasks.demo:true_rewards", "weight": 0.25},
    {"name": "tokens", "length": "tokens", "weight": -0.125},
    {"name": "relative", "length": "relative", "weight": 0.0},
]
NAMES = ["rm", "rm/spread", "rm/member_0", "rm/member_1", "true", "tokens", "relative"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """An SFT policy, two reward models that started from it, and a recipe with parts."""
    folder = tmp_path_factory.mktemp("chain")
    run_sft(folder / "sft", data={"demo": {"num_train": 24, "num_eval": 6}})
    for seed in (0, 1):
        model = {"trainable_layers": 1}  # the layer below stays the policy's
        run_reward_model(folder / f"rm{seed}", policy=folder / "sft" / "policy", seed=seed, model=model)
    changes = {
        "num_steps": 2,
        "model": {"path": "sft/policy"},
        "reward": {"function": None, "parts": PARTS, "batch_size": 4},
        "eval": {"num_prompts": 5},
    }
    write_recipe(folder / "parts.yaml", merged(ONLINE, changes))
    run(plain("drpo"), "parts.yaml", "run_dir=one", cwd=folder)
    return folder


def run_with(chain: Path, run_dir: Path, section: dict, **changes) -> tuple[list[dict], object]:
    """The reproducible metrics of a run in this process with a `reward` section, and its RewardFn."""
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), run_dir, 0, 1.0)
    file = write_recipe(run_dir.with_name(f"{run_dir.name}_reward.yaml"), {"reward": section})
    policy = chain / "sft" / "policy"
    reward = reward_from(load_recipe(OnlineRecipe, file, []).reward, engine, str(policy))
    rows = run_online(policy, run_dir, merged(merged(RECIPE, {"num_steps": 2}), changes), reward)
    return [reproducible(row) for row in rows], reward


def test_each_part_is_logged_apart_and_the_score_is_their_weighted_sum(chain):
    rows = metrics_of(chain / "one")
    for row in rows[1:]:
        assert [key for key in row if key.startswith("reward/")] == [f"reward/{name}" for name in NAMES]
        total = sum(part["weight"] * row[f"reward/{part['name']}"] for part in PARTS)
        assert row["objective/score"] == pytest.approx(total, abs=1e-4)
        assert row["reward/tokens"] == pytest.approx(row["objective/length"])
        members = (row["reward/rm/member_0"] + row["reward/rm/member_1"]) / 2
        assert row["reward/rm/spread"] > 0
        assert row["reward/rm"] == pytest.approx(members - 0.5 * row["reward/rm/spread"], abs=1e-4)
    evaluated = rows[-1]
    assert {f"eval/score/{name}" for name in NAMES} <= evaluated.keys()
    total = sum(part["weight"] * evaluated[f"eval/score/{part['name']}"] for part in PARTS)
    assert evaluated["eval/score"] == pytest.approx(total, abs=1e-4)


def test_a_run_on_an_ensemble_of_one_is_the_run_on_the_model_bit_for_bit(chain, tmp_path):
    path = str(chain / MODELS[0])
    alone, _ = run_with(chain, tmp_path / "alone", {"path": path})
    joint, _ = run_with(chain, tmp_path / "joint", {"ensemble": {"paths": [path], "combine": "min"}})
    assert [{k: v for k, v in row.items() if not k.startswith("reward/")} for row in joint] == alone
    assert all(row["reward/spread"] == 0.0 for row in joint)
    for row in joint:
        assert row["reward/member_0"] == pytest.approx(row["objective/score"], abs=1e-6)


def test_members_that_share_the_frozen_trunk_change_no_number(chain, tmp_path, monkeypatch):
    section = {"ensemble": {"paths": [str(chain / path) for path in MODELS], "combine": "min"}}
    frozen = {"model": {"trainable_layers": 1}}
    shared, reward = run_with(chain, tmp_path / "shared", section, **frozen)
    assert [scorer.shares_trunk for scorer in reward.scorers()] == [True, True] and reward.shares_trunk
    monkeypatch.setattr(RewardModelScorer, "share_weights", lambda scorer, policy, critic: None)
    apart, reward = run_with(chain, tmp_path / "apart", section, **frozen)
    assert not reward.shares_trunk
    assert_close(shared, apart, 1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_logs_what_a_whole_one_does(chain):
    resumed = chain / "resumed"
    shutil.copytree(chain / "one", resumed)
    *_, last = list_checkpoints(resumed)
    shutil.rmtree(last)
    shutil.rmtree(resumed / "policy")
    (resumed / "metrics.jsonl").write_text(
        "".join((resumed / "metrics.jsonl").read_text().splitlines(True)[:-1])
    )
    run(plain("drpo"), "parts.yaml", "run_dir=resumed", cwd=chain)
    assert metrics_of(resumed) == metrics_of(chain / "one")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_two_processes_log_what_one_does(chain, launcher):
    """Under ZeRO-3 the members are cut in pieces, and an odd prompt leaves one process with less to evaluate."""
    command = partitioned("drpo", chain) if launcher == "zero3" else ddp("drpo")
    run(command, "parts.yaml", f"run_dir={launcher}", "ppo.microbatch_size=4", cwd=chain)
    assert_close(metrics_of(chain / "one"), metrics_of(chain / launcher), 2e-4)
