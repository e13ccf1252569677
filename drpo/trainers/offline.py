"""The loop that SFT, reward models and preference training share: batches, one optimizer step each, evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.data.load import DataConfig
from drpo.data.order import item_at
from drpo.engine import Engine, EngineConfig
from drpo.metrics import Phases
from drpo.models.loading import ModelConfig
from drpo.optim import OptimConfig, build_optimizer, scheduled_rate, set_learning_rates
from drpo.run_folder import CheckpointConfig, LogConfig, Resume, RunFolder, finite_or_stop


class Objective(Protocol):
    """A loss as an nn.Module around the model it trains, so that one forward is one call of the engine's module.

    `forward` takes a collated batch and returns the loss summed over targets, one number a row (b,), and further
    named sums over the targets; `num_targets` counts what the sums are divided by (tokens, pairs, ...).
    """

    model: nn.Module

    def collate(self, items: Sequence[Any]) -> Any: ...

    def num_targets(self, batch: Any) -> int: ...

    def __call__(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class BatchConfig:
    """How many examples a step has and how many fit on a device."""

    size: int = 64
    """Examples per optimizer step over all processes."""
    microbatch_size: int = 8
    """Examples per forward on one device; changes memory and speed, not the result."""
    num_epochs: float = 1.0
    """Passes over the data when num_steps is null."""

    def __post_init__(self) -> None:
        for name in ("size", "microbatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} must be >= 1, got {getattr(self, name)}")
        if self.num_epochs <= 0:
            raise ValueError(f"batch.num_epochs must be > 0, got {self.num_epochs}")


@dataclass(frozen=True)
class OfflineEvalConfig:
    """When the held-out examples are looked at."""

    every: int = 50
    """Evaluate after every so many steps, and after the last; 0 for never."""
    num_examples: int = 512
    """How many held-out examples, the first ones."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"eval.every must be >= 0, got {self.every}")
        if self.num_examples < 1:
            raise ValueError(f"eval.num_examples must be >= 1, got {self.num_examples}")


@dataclass(frozen=True)
class OfflineRecipe:
    """What the recipes of all offline stages share."""

    run_dir: str = "runs/offline"
    """Folder of the run."""
    seed: int = 0
    """Seed of all randomness."""
    num_steps: int | None = None
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

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1 or null, got {self.num_steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")


def fit(
    recipe: OfflineRecipe,
    engine: Engine,
    run: RunFolder,
    objective: Objective,
    train: Sequence[Any],
    held_out: Sequence[Any],
    *,
    name: str,
    sample: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]] | None = None,
) -> None:
    """Train `objective` in place for `num_steps` optimizer steps, resuming where the run folder says.

        loss of a step = sum over targets of all micro-batches and processes / number of those targets

    `sample` gives further metrics and sample rows at every evaluation.
    Raises ConfigError when batch.size does not divide over the processes, FloatingPointError on inf or nan.
    """
    batch, optim, evaluation, seed = recipe.batch, recipe.optim, recipe.eval, recipe.seed
    num_steps = recipe.num_steps or math.ceil(batch.num_epochs * len(train) / batch.size)
    if batch.size % engine.world_size:
        raise ConfigError(f"batch.size={batch.size} does not divide over {engine.world_size} processes")
    if evaluation.every and not held_out:
        raise ConfigError(
            "there are no held-out examples to evaluate on; set data.eval_split or data.eval_fraction, or turn the "
            "evaluation off with eval.every=0"
        )
    optimizer = build_optimizer([objective.model.parameters()], optim)
    module = engine.prepare(objective, optimizer)
    state = run.open()
    start = state["step"] if state else 0
    run.start_progress(name, start, num_steps)
    for step in range(start + 1, num_steps + 1):
        phases = Phases()
        indices = range((step - 1) * batch.size, step * batch.size)
        local = [item_at(train, index, seed) for index in indices[engine.shard(batch.size)]]
        microbatches = [
            objective.collate(local[i : i + batch.microbatch_size])
            for i in range(0, len(local), batch.microbatch_size)
        ]
        rate = scheduled_rate(optim.learning_rate, optim, step - 1, num_steps)
        set_learning_rates(engine.optimizer, [rate])
        check_finite = functools.partial(finite_or_stop, engine, run.path, step)
        with phases("update"):
            counts = [objective.num_targets(microbatch) for microbatch in microbatches]
            num_targets = float(engine.sum(torch.tensor(float(sum(counts)), device=engine.device)))
            sums: dict[str, Tensor] = {}
            row_losses = []
            for index, microbatch in enumerate(microbatches):
                last = index == len(microbatches) - 1
                with engine.accumulating(last):
                    losses, further = module(microbatch)
                    engine.backward(losses.sum() / num_targets * engine.loss_scale(), last)
                row_losses.append(losses.detach())
                _add(sums, {"loss": losses.sum(), **further})
            check_finite(torch.cat(row_losses), "the loss")
            grad_norm = engine.optimizer_step()
            check_finite(torch.tensor([grad_norm], device=engine.device), "the gradient norm")
        metrics = _means("train", engine, sums, num_targets)
        metrics |= {
            "optim/learning_rate": rate,
            "optim/grad_norm": grad_norm,
            "train/num_targets": num_targets,
        }
        rows: list[dict[str, Any]] = []
        if evaluation.every and (step % evaluation.every == 0 or step == num_steps):
            with phases("eval"), engine.whole_weights(objective):
                metrics |= held_out_means(engine, objective, held_out[: evaluation.num_examples], batch)
                if sample is not None:
                    further_metrics, rows = sample()
                    metrics |= further_metrics
        metrics |= phases.seconds()
        metrics["perf/examples_per_second"] = batch.size / metrics["time/update"]
        metrics["perf/peak_memory_gib"] = engine.peak_memory_gib()
        run.write_samples(step, rows)
        run.record(step, metrics, ("train/loss", "train/accuracy", "eval/loss", "eval/accuracy", "time/step"))
        run.advance()
        run.save(step, num_steps, {})


@torch.no_grad()
def held_out_means(
    engine: Engine, objective: Objective, items: Sequence[Any], batch: BatchConfig
) -> dict[str, float]:
    """`eval/<name>` of the objective's sums over all `items`; processes share them."""
    sums: dict[str, Tensor] = {}
    num_targets = 0.0
    mine = items[engine.rank :: engine.world_size]
    for first in range(0, len(mine), batch.microbatch_size):
        microbatch = objective.collate(mine[first : first + batch.microbatch_size])
        with engine.autocast():
            losses, further = objective(microbatch)
        num_targets += objective.num_targets(microbatch)
        _add(sums, {"loss": losses.sum(), **further})
    total = float(engine.sum(torch.tensor(num_targets, device=engine.device)))
    every_name = sorted(set(engine.gather_objects(list(sums))))
    zero = torch.zeros((), device=engine.device)
    return _means("eval", engine, {name: sums.get(name, zero) for name in every_name}, total)


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value.detach().double()


def _means(group: str, engine: Engine, sums: dict[str, Tensor], num_targets: float) -> dict[str, float]:
    names = sorted(sums)
    values: Iterable[float] = engine.sum(torch.stack([sums[name] for name in names])).tolist()
    return {f"{group}/{name}": value / num_targets for name, value in zip(names, values, strict=True)}
