"""Train offline: the loop of SFT, reward models and preference training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from drpo.config import ConfigError, Section, refuse, refuse_changed, setting
from drpo.data.load import DataConfig
from drpo.data.order import item_at
from drpo.decimals import decimal_ceil
from drpo.engine import Engine, EngineConfig
from drpo.microbatches import Lengths, microbatches
from drpo.models.loading import ModelConfig
from drpo.optim import OptimConfig, build_optimizer, scheduled_rate, set_learning_rates
from drpo.run.folder import CheckpointConfig, LogConfig, Resume, RunFolder
from drpo.run.metrics import Phases, peak_memory_gib
from drpo.run.result import Result
from drpo.trainers.finite import finite_or_stop

RowMetrics = dict[str, Tensor]


class Objective(nn.Module):
    """A loss as a module around the model it trains, so that one forward is one call of the engine's module.

    Subclasses define `collate`, which makes a batch of items, `lengths`, and `forward`, which takes a batch and returns
    the losses, one number per row (b,) summed over the row's targets, and further named numbers of the rows, each (b,).
    What the lengths depend on beside their item, `before_lengths` finds out.

    A loss that depends on all rows of the step sets `needs_step_statistics`: the rows are then computed twice, first
    without gradients and statistics; `step_statistics` of these losses and numbers is an input of the second forward.
    """

    needs_step_statistics = False
    before_lengths: Callable[[Sequence[Any]], None] | None = None
    "Looks at the model, whose weights are whole, and at all items of the run, before `lengths`; None: no need."

    def __init__(self, model: nn.Module, pad_id: int, device: torch.device) -> None:
        super().__init__()
        self.model, self._pad_id, self._device = model, pad_id, device

    def lengths(self, item: Any) -> Lengths:
        """Return the tokens of an item's query and of its response, counted for every row that it takes."""
        raise NotImplementedError

    def num_targets(self, batch: Any) -> int:
        """Return the divisor of the losses' sum: the number of tokens, pairs, ..."""
        return len(batch)

    def summarise(self, losses: Tensor, row_metrics: RowMetrics) -> dict[str, float]:
        """Make metrics of the losses and numbers of all rows: the mean of every number."""
        return {name: float(values.mean()) for name, values in row_metrics.items()}


@dataclass(frozen=True)
class BatchConfig(Section):
    """Number of examples per step and per forward."""

    size: int = setting(64, ge=1)
    """Examples per optimizer step over all processes."""
    microbatch_size: int = setting(8, ge=1)
    """Examples per forward on one device; changes memory and speed, not the result."""
    microbatch_tokens: int | None = setting(None, ge=1)
    """Tokens per forward of training and evaluation on one device, padding included, in place of microbatch_size
    examples. Examples of like length then go together, and a longer one alone. A prompt that the responses of a pair
    share counts once."""
    num_epochs: float = setting(1.0, gt=0)
    """Passes over the data when num_steps is null."""


@dataclass(frozen=True)
class OfflineEvalConfig(Section):
    """Schedule and size of the evaluation on held-out examples."""

    every: int = setting(50, ge=0)
    """Evaluate after every so many steps, and after the last; 0 for never."""
    num_examples: int = setting(512, ge=1)
    """How many held-out examples, the first ones."""


@dataclass(frozen=True)
class OfflineRecipe(Section):
    """Settings that the recipes of all offline stages share."""

    run_dir: str = "runs/offline"
    """Folder of the run."""
    seed: int = setting(0, ge=0)
    """Seed of all randomness."""
    num_steps: int | None = setting(None, ge=1)
    """Optimizer steps; null: batch.num_epochs passes over the data."""
    resume: Resume = "auto"
    """auto: go on from the last checkpoint in run_dir, if any. restart: move an earlier run aside."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: OfflineEvalConfig = field(default_factory=OfflineEvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def check(self) -> None:
        if self.num_steps is not None:
            rule = f"and num_steps={self.num_steps} both set the length of training; set num_steps=null, or drop it"
            refuse_changed(self.batch, ["num_epochs"], rule, "batch.")
        rule = "is for online runs; offline stages sample at every evaluation (eval.every): drop it"
        refuse(self.log.samples_every not in (0, LogConfig.samples_every), "log.samples_every", rule)


def fit(
    run: RunFolder,
    objective: Objective,
    stages: Sequence[Sequence[Any]],
    held_out: Sequence[Any],
    *,
    name: str,
    result: Result | None = None,
    sample: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]] | None = None,
    after_step: Callable[[int, bool], None] | None = None,
) -> None:
    """Train `objective` in place on one stage of examples after the other, resuming from the run folder.

        loss of a step = sum over targets of all micro-batches and processes / number of those targets

    Every stage has its own `num_steps` (or passes) and its own learning-rate schedule. Raises ConfigError when
    batch.size does not divide over the processes, or a stage is no longer than the warm-up; FloatingPointError on inf
    or nan.

    Args:
        run: the folder of the run, with recipe and engine.
        objective: the loss around the model.
        stages: examples of each stage.
        held_out: examples of the evaluation.
        name: label of the progress bar.
        result: written at the steps that the recipe asks for.
        sample: gives further metrics and sample rows at every evaluation.
        after_step: called with (step, stage_ended); may change the inputs of the loss between steps.
    """
    recipe, engine = run.recipe, run.engine
    batch, optim, evaluation = recipe.batch, recipe.optim, recipe.eval
    if batch.size % engine.world_size:
        raise ConfigError(f"batch.size={batch.size} does not divide over {engine.world_size} processes")
    if evaluation.every and not held_out:
        raise ConfigError(
            "there are no held-out examples to evaluate on; set data.eval_split or data.eval_fraction, or turn the "
            "evaluation off with eval.every=0"
        )
    schedule = _schedule(recipe, stages)
    num_steps = len(schedule)
    optimizer = build_optimizer([objective.model.parameters()], optim, engine.casts_weights)
    module = engine.prepare(objective, optimizer)
    if batch.microbatch_tokens is not None and objective.before_lengths is not None:
        with engine.whole_weights(objective):
            objective.before_lengths([*chain(*stages), *held_out])
    state = run.open()
    start = state["step"] if state else 0
    run.start_progress(name, start, num_steps)
    for step in range(start + 1, num_steps + 1):
        phases = Phases()
        examples, stage_step, num_stage_steps, rate = schedule[step - 1]
        indices = range(stage_step * batch.size, (stage_step + 1) * batch.size)
        items = [item_at(examples, index, recipe.seed) for index in indices]
        set_learning_rates(engine.optimizer, [rate])
        with phases("update"):
            check_finite = functools.partial(finite_or_stop, engine, run.path, step)
            metrics = _take_step(engine, module, objective, items, batch, check_finite)
        metrics["optim/learning_rate"] = rate
        samples: list[dict[str, Any]] = []
        stage_ended = stage_step + 1 == num_stage_steps
        if evaluation.every and (step % evaluation.every == 0 or stage_ended):
            with phases("eval"), engine.whole_weights(objective):
                metrics |= held_out_metrics(engine, objective, held_out[: evaluation.num_examples], batch)
                if sample is not None:
                    sample_metrics, samples = sample()
                    metrics |= sample_metrics
        if after_step is not None:
            after_step(step, stage_ended)
        metrics |= phases.seconds()
        metrics["perf/examples_per_second"] = batch.size / metrics["time/update"]
        metrics["perf/peak_memory_gib"] = peak_memory_gib(engine.device)
        run.write_samples(step, samples)
        run.record(step, metrics, ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "time/step"))
        run.advance()
        if result is not None:
            result.at_step(step)
        run.save(step, num_steps, {})


def _schedule(
    recipe: OfflineRecipe, stages: Sequence[Sequence[Any]]
) -> list[tuple[Sequence[Any], int, int, float]]:
    """Return for every step: examples of its stage, place in the stage, the stage's length, learning rate."""
    batch, optim = recipe.batch, recipe.optim
    return [
        (examples, stage_step, num_stage_steps, rate)
        for examples in stages
        for num_stage_steps in [
            recipe.num_steps or decimal_ceil(batch.num_epochs * len(examples) / batch.size)
        ]
        for stage_step in range(num_stage_steps)
        for rate in [scheduled_rate(optim.learning_rate, optim, stage_step, num_stage_steps)]
    ]


def _take_step(
    engine: Engine,
    module: nn.Module,
    objective: Objective,
    items: Sequence[Any],
    config: BatchConfig,
    check_finite: Callable[[Tensor, str], None],
) -> dict[str, float]:
    """Take one optimizer step on `items`, of which each process takes its share; return metrics over all of them."""
    if config.microbatch_tokens is None:
        parts = chunks(range(len(items))[engine.shard(len(items))], config.microbatch_size)
    else:
        parts = _of_like_length(objective, items, config.microbatch_tokens, engine.world_size)
        parts = parts[engine.rank :: engine.world_size]
    batches, num_targets = _collated(engine, objective, items, parts)
    statistics: tuple[Tensor, ...] = ()
    if objective.needs_step_statistics:
        with torch.no_grad():
            results = _gather(engine, [module(batch) for batch in batches])
        statistics = (objective.step_statistics(*results),)
    results = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with engine.accumulating(last):
            losses, row_metrics = module(batch, *statistics)
            engine.backward(losses.sum() / num_targets * engine.loss_scale(), last)
        results.append((losses.detach(), row_metrics))
    indices = torch.tensor([index for part in parts for index in part], device=engine.device)
    item_losses = torch.cat([losses for losses, _ in results])
    # At their items of the whole step, 0 elsewhere, so that an error names the right one.
    check_finite(item_losses.new_zeros(len(items)).index_copy(0, indices, item_losses), "the loss")
    grad_norm = engine.optimizer_step()
    check_finite(torch.tensor([grad_norm], device=engine.device), "the gradient norm")
    metrics = _metrics("train", objective, *_gather(engine, results), num_targets)
    return metrics | {"train/num_targets": num_targets, "optim/grad_norm": grad_norm}


@torch.no_grad()
def held_out_metrics(
    engine: Engine, objective: Objective, items: Sequence[Any], config: BatchConfig
) -> dict[str, float]:
    """Compute `eval/<name>` of the objective over all `items`, divided among the processes."""
    local = items[engine.rank :: engine.world_size]
    if config.microbatch_tokens is None:
        parts = chunks(range(len(local)), config.microbatch_size)
    else:
        parts = _of_like_length(objective, local, config.microbatch_tokens)
    batches, num_targets = _collated(engine, objective, local, parts)
    # Forwards of a reference that is cut over the processes need all of them: others' batches fill up, uncounted.
    num_forwards = int(engine.max(len(parts))) if engine.partitions_weights else len(parts)
    filling = [objective.collate(items[:1])] * (num_forwards - len(parts))

    def forward(*statistics: Tensor) -> tuple[Tensor, RowMetrics]:
        with engine.autocast():
            results = [objective(batch, *statistics) for batch in (*batches, *filling)]
        return _gather(engine, results[: len(parts)])

    results = forward()
    if objective.needs_step_statistics:
        results = forward(objective.step_statistics(*results))
    return _metrics("eval", objective, *results, num_targets)


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut items into consecutive parts of `size`, the last one shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def _of_like_length(
    objective: Objective, items: Sequence[Any], max_tokens: int, world_size: int = 1
) -> list[list[int]]:
    """Group the indices of items by length."""
    return microbatches([objective.lengths(item) for item in items], None, max_tokens, world_size)


def _collated(
    engine: Engine, objective: Objective, items: Sequence[Any], parts: Sequence[Sequence[int]]
) -> tuple[list[Any], float]:
    """Collate the items of this process's parts, and count the targets of all processes."""
    batches = [objective.collate([items[index] for index in part]) for part in parts]
    num_local = sum(objective.num_targets(batch) for batch in batches)
    return batches, float(engine.sum(torch.tensor(float(num_local), device=engine.device)))


def _gather(engine: Engine, results: Sequence[tuple[Tensor, RowMetrics]]) -> tuple[Tensor, RowMetrics]:
    """Gather losses and row metrics of all micro-batches and processes, in float64, on every process."""
    local = []
    for losses, row_metrics in results:
        named = {"": losses, **row_metrics}
        numbers = torch.stack([values.detach().double() for values in named.values()]).tolist()
        local.append(dict(zip(named, numbers, strict=True)))
    gathered = engine.gather_objects(local)
    columns = {
        name: torch.tensor([number for part in gathered for number in part[name]], dtype=torch.float64)
        for name in gathered[0]
    }
    return columns.pop(""), columns


def _metrics(
    group: str, objective: Objective, losses: Tensor, row_metrics: RowMetrics, num_targets: float
) -> dict[str, float]:
    metrics = {"loss": float(losses.sum()) / num_targets, **objective.summarise(losses, row_metrics)}
    return {f"{group}/{name}": value for name, value in metrics.items()}
