"""The loop of the offline stages, on a model of one weight whose every number can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from online_runs import forget_precision
from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.optim import OptimConfig
from drpo.run.checkpoints import list_checkpoints
from drpo.run.folder import CheckpointConfig, RunFolder
from drpo.run.metrics import read_metrics
from drpo.trainers.offline import (
    BatchConfig,
    Objective,
    OfflineEvalConfig,
    OfflineRecipe,
    fit,
    held_out_metrics,
)

# Items are ragged lists of numbers; each number is a target.
TRAIN = [[1.0], [2.0, 3.0, 4.0], [5.0, 6.0], [7.0], [8.0, 9.0, 10.0, 11.0], [12.0], [13.0, 14.0], [15.0]]
HELD_OUT = [[1.0, 2.0, 3.0], [10.0], [20.0, 30.0], [4.0], [5.0, 6.0]]


class Weight(Objective):
    """loss of a target x = w x, so the gradient of the mean loss is the mean of x."""

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__(nn.Linear(1, 1, bias=False), pad_id=0, device=torch.device("cpu"))
        with torch.no_grad():
            self.model.weight.fill_(weight)

    def collate(self, items: list[list[float]]) -> list[list[float]]:
        return items

    def lengths(self, item: list[float]) -> tuple[int, int]:
        return 1, len(item)

    def num_targets(self, batch: list[list[float]]) -> int:
        return sum(map(len, batch))

    def forward(self, batch: list[list[float]]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = torch.stack([sum(self.model(torch.tensor([x])) for x in item).squeeze() for item in batch])
        return losses, {"x": torch.tensor([sum(item) for item in batch])}


def recipe_for(run_dir: Path, *, every: int = 0, keep: int = 2, **changes) -> OfflineRecipe:
    defaults = {
        "num_steps": 1,
        "batch": BatchConfig(size=8, microbatch_size=8),
        "optim": OptimConfig(learning_rate=0.5, max_grad_norm=None),
        "eval": OfflineEvalConfig(every=0),
        "checkpoint": CheckpointConfig(every=every, keep=keep),
        "engine": EngineConfig(mixed_precision="no", trackers=[]),
    }
    return OfflineRecipe(run_dir=str(run_dir), **{**defaults, **changes})


def fitted(recipe: OfflineRecipe, train=TRAIN, held_out=(), weight: float = 2.0, sample=None):
    """The weight after `fit` on one stage, and the metrics."""
    return fitted_in_stages(recipe, Weight(weight), [train], held_out, sample=sample)


def fitted_in_stages(recipe: OfflineRecipe, objective: Weight, stages: list, held_out=(), **further):
    forget_precision()
    engine = Engine(recipe.engine, Path(recipe.run_dir), recipe.seed, recipe.optim.max_grad_norm)
    run = RunFolder(recipe, engine)
    try:
        fit(run, objective, stages, held_out, name="test", **further)
    finally:
        run.close()
        forget_precision()
    return objective.model.weight.item(), read_metrics(run.metrics.path)


CUTS = [*({"microbatch_size": n} for n in (1, 3, 8, 100)), *({"microbatch_tokens": n} for n in (1, 8, 99))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_loss_and_gradient_are_means_over_the_targets_of_the_whole_step(tmp_path, cut):
    recipe = recipe_for(tmp_path / "run", batch=BatchConfig(size=8, **cut))
    weight, (row,) = fitted(recipe)
    mean = 120 / 15  # 1 + 2 + ... + 15 over 15 targets; the mean of the means of the items is another
    assert row["train/num_targets"] == 15
    assert row["train/loss"] == pytest.approx(2.0 * mean)
    assert row["train/x"] == pytest.approx(120 / 8)  # numbers of rows are averaged over rows
    assert row["optim/grad_norm"] == pytest.approx(mean)
    # Adam's first step is the learning rate times g / (|g| + eps), and the first rate is the peak.
    assert weight == pytest.approx(2.0 - 0.5 * mean / (mean + 1e-5), abs=1e-6)
    assert row["optim/learning_rate"] == 0.5


def test_every_target_of_a_pass_is_seen_once(tmp_path):
    recipe = recipe_for(tmp_path / "run", num_steps=4, batch=BatchConfig(size=2, microbatch_size=1))
    _, rows = fitted(recipe)
    assert sum(row["train/num_targets"] for row in rows) == 15
    assert sum(row["train/x"] * 2 for row in rows) == pytest.approx(120)


@pytest.mark.parametrize(
    "num_steps, num_epochs, expected",
    [(None, 1.0, 3), (None, 2.0, 6), (None, 0.5, 2), (None, 0.1, 1), (2, 1.0, 2)],
)
def test_number_of_steps(tmp_path, num_steps, num_epochs, expected):
    """8 items in batches of 3: a pass is 2.67 steps, rounded up at the end of all passes."""
    batch = BatchConfig(size=3, microbatch_size=3, num_epochs=num_epochs)
    _, rows = fitted(recipe_for(tmp_path / "run", num_steps=num_steps, batch=batch))
    assert [row["step"] for row in rows] == list(range(1, expected + 1))


def test_microbatches_of_tokens_hold_items_of_like_length(tmp_path):
    objective, seen = Weight(), []
    collate = objective.collate
    objective.collate = lambda items: (seen.append([1 + len(item) for item in items]), collate(items))[1]
    recipe = recipe_for(tmp_path / "run", batch=BatchConfig(size=8, microbatch_tokens=8))
    fitted_in_stages(recipe, objective, [TRAIN])
    # 1 + len of the items: 5, 4, 3, 3, 2, 2, 2, 2; a part is its longest item times its items
    assert seen == [[5], [4, 3], [3, 2], [2, 2, 2]]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_evaluation_is_the_mean_over_all_targets_of_ragged_batches(tmp_path, cut):
    forget_precision()
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    means = held_out_metrics(engine, Weight(0.5), HELD_OUT, BatchConfig(**cut))
    forget_precision()
    assert means == {"eval/loss": pytest.approx(0.5 * 81 / 9), "eval/x": pytest.approx(81 / 5)}


def test_evaluates_the_first_examples_every_so_many_steps_and_after_the_last(tmp_path):
    evaluation = OfflineEvalConfig(every=2, num_examples=2)
    recipe = recipe_for(tmp_path / "run", num_steps=5, eval=evaluation)
    samples = iter([(1.0, "first"), (2.0, "second"), (3.0, "third")])

    def sample() -> tuple[dict[str, float], list[dict]]:
        reward, response = next(samples)
        row = {
            "prompt": "p",
            "prefix": "",
            "continuation": response,
            "ended": True,
            "scores": {"true": reward},
        }
        return {"eval/true_reward": reward}, [row]

    _, rows = fitted(recipe, held_out=HELD_OUT, sample=sample)
    evaluated = {row["step"]: row for row in rows if "eval/x" in row}
    assert list(evaluated) == [2, 4, 5]
    assert all(row["eval/x"] == pytest.approx(16 / 2) for row in evaluated.values())
    assert [row["eval/true_reward"] for row in evaluated.values()] == [1.0, 2.0, 3.0]
    written = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["continuation"]) for row in written] == [
        (2, "first"),
        (4, "second"),
        (5, "third"),
    ]


def test_with_every_0_nothing_is_evaluated(tmp_path):
    _, (row,) = fitted(recipe_for(tmp_path / "never"), held_out=HELD_OUT)
    assert not [key for key in row if key.startswith("eval/")]


def test_an_evaluation_without_held_out_examples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no held-out examples.*eval.every=0"):
        fitted(recipe_for(tmp_path / "none", eval=OfflineEvalConfig(every=1)), held_out=())


def test_goes_on_from_the_last_checkpoint_as_if_never_stopped(tmp_path):
    batch = BatchConfig(size=3, microbatch_size=2)
    whole = fitted(recipe_for(tmp_path / "whole", num_steps=6, batch=batch))
    stopped = recipe_for(tmp_path / "stopped", num_steps=6, batch=batch, every=1, keep=6)
    fitted(stopped)
    for checkpoint in list_checkpoints(tmp_path / "stopped")[3:]:  # as a kill after step 3 leaves it
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    weight, rows = fitted(stopped, weight=-100.0)  # the weights come from the checkpoint
    assert weight == whole[0]
    drop = ("time/", "perf/")
    assert [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows] == [
        {k: v for k, v in row.items() if not k.startswith(drop)} for row in whole[1]
    ]


def test_gradients_are_clipped_over_the_whole_step_and_reported_before(tmp_path):
    """Adam's first step does not see the size of a gradient, but its epsilon does: 1e-5 here, so clip below it."""
    optim = OptimConfig(learning_rate=0.5, max_grad_norm=1e-5)
    recipe = recipe_for(tmp_path / "run", optim=optim, batch=BatchConfig(size=8, microbatch_size=1))
    weight, (row,) = fitted(recipe)
    assert row["optim/grad_norm"] == pytest.approx(8.0)
    assert weight == pytest.approx(2.0 - 0.5 * 1e-5 / (1e-5 + 1e-5), abs=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    items = [[1.0], [2.0], [math.nan], [4.0]]
    recipe = recipe_for(tmp_path / "run", num_steps=3, batch=BatchConfig(size=4, microbatch_size=1))
    with pytest.raises(
        FloatingPointError, match="step 1: the loss is not finite in row.*last checkpoint: none"
    ):
        fitted(recipe, train=items)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- stages -----------------------------------------------------------------------------------------------


def test_stages_follow_each_other_with_schedules_and_evaluations_of_their_own(tmp_path):
    ended = []
    recipe = recipe_for(
        tmp_path / "run",
        num_steps=None,
        batch=BatchConfig(size=2, microbatch_size=2),
        optim=OptimConfig(learning_rate=0.5, warmup_steps=1, max_grad_norm=None),
        eval=OfflineEvalConfig(every=100),
    )
    stages = [[[1.0]] * 4, [[100.0]] * 6]
    _, rows = fitted_in_stages(
        recipe, Weight(), stages, HELD_OUT, after_step=lambda step, end: ended.append((step, end))
    )
    assert [row["train/x"] for row in rows] == [1.0] * 2 + [100.0] * 3
    assert ended == [(1, False), (2, True), (3, False), (4, False), (5, True)]
    rates = [row["optim/learning_rate"] for row in rows]
    assert rates == [0.25, 0.5, 0.25, 0.5, 0.25]  # up in one step, then down to 0 over the rest
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 5]


def test_every_stage_gets_the_number_of_steps_asked_for(tmp_path):
    recipe = recipe_for(tmp_path / "run", num_steps=3, batch=BatchConfig(size=2, microbatch_size=2))
    _, rows = fitted_in_stages(recipe, Weight(), [[[1.0]] * 4, [[100.0]] * 9])
    assert [row["train/x"] for row in rows] == [1.0] * 3 + [100.0] * 3


def test_a_warm_up_as_long_as_a_stage_is_refused_before_the_run(tmp_path):
    optim = OptimConfig(learning_rate=0.5, warmup_steps=2)
    recipe = recipe_for(tmp_path / "run", num_steps=None, batch=BatchConfig(size=2), optim=optim)
    with pytest.raises(ConfigError, match="optim.warmup_steps is 2, it must be below the number of steps, 2"):
        fitted_in_stages(recipe, Weight(), [[[1.0]] * 8, [[1.0]] * 4])
    assert not (tmp_path / "run").exists()


def test_what_happens_after_a_step_counts_from_the_next_one(tmp_path):
    objective = Weight()

    def add_one(step: int, stage_ended: bool) -> None:
        with torch.no_grad():
            objective.model.weight.add_(1.0)

    optim = OptimConfig(learning_rate=1e-9, max_grad_norm=None)
    recipe = recipe_for(tmp_path / "run", num_steps=3, optim=optim)
    _, rows = fitted_in_stages(recipe, objective, [[[1.0]] * 8], after_step=add_one)
    assert [row["train/loss"] for row in rows] == pytest.approx([2.0, 3.0, 4.0])


# --- looking ahead ----------------------------------------------------------------------------------------


class AgainstTheMean(Weight):
    """loss of a target x = w x m with m, a constant, the mean of the item sums over all items looked at."""

    needs_step_statistics = True

    def __init__(self) -> None:
        super().__init__()
        self.forwards: list[tuple[bool, int]] = []

    def step_statistics(self, losses: Tensor, rows: dict[str, Tensor]) -> Tensor:
        assert losses.tolist() == pytest.approx((self.model.weight.item() * rows["x"]).tolist())
        return rows["x"].mean()

    def forward(self, batch: list[list[float]], step_statistics: Tensor | None = None):
        self.forwards.append((torch.is_grad_enabled(), len(batch)))
        losses, rows = super().forward(batch)
        if step_statistics is None:
            return losses, rows
        return losses * step_statistics.float(), rows | {"mean": step_statistics.expand(len(batch))}


@pytest.mark.parametrize("microbatch_size", [1, 3, 8])
def test_an_objective_may_look_at_the_whole_step_first(tmp_path, microbatch_size):
    recipe = recipe_for(
        tmp_path / "run",
        batch=BatchConfig(size=8, microbatch_size=microbatch_size),
        eval=OfflineEvalConfig(every=1),
    )
    objective = AgainstTheMean()
    _, (row,) = fitted_in_stages(recipe, objective, [TRAIN], HELD_OUT)
    mean = 120 / 8  # of the sums of the items; the loss is over 15 targets
    assert row["train/mean"] == pytest.approx(mean)
    assert row["train/loss"] == pytest.approx(2.0 * mean * 120 / 15)
    assert row["optim/grad_norm"] == pytest.approx(mean * 120 / 15)
    assert row["eval/mean"] == pytest.approx(81 / 5)
    sizes = [len(TRAIN[first : first + microbatch_size]) for first in range(0, 8, microbatch_size)]
    training = objective.forwards[: 2 * len(sizes)]
    assert training == [(False, size) for size in sizes] + [(True, size) for size in sizes]


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": 0}, "num_steps must be >= 1 or null"),
        ({"seed": -1}, "seed must be >= 0"),
    ],
)
def test_recipe_values_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"size": 0}, {"microbatch_size": 0}, {"num_epochs": 0.0}])
def test_batch_values_are_checked(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be"):
        BatchConfig(**changes)


@pytest.mark.parametrize("changes", [{"every": -1}, {"num_examples": 0}])
def test_evaluation_values_are_checked(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be"):
        OfflineEvalConfig(**changes)
