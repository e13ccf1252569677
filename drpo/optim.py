"""The optimizer and its learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from drpo.config import ConfigError, Section, refuse, setting
from drpo.schedules import learning_rate_factor


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = setting(3e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls from the peak to 0 at the last step (constant: not at all)."""
    warmup_steps: int = setting(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = setting(0.0, ge=0)
    """AdamW's weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the two moments."""
    eps: float = setting(1e-5, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float | None = setting(1.0, gt=0)
    """Clip the global gradient norm to this; null for no clipping."""

    def check(self) -> None:
        invalid = len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)
        refuse(invalid, "betas", f"must be two numbers in [0, 1), got {self.betas}")


def build_optimizer(
    groups: Sequence[Iterable[torch.nn.Parameter]], config: OptimConfig, has_master_weights: bool = False
) -> torch.optim.AdamW:
    """Build AdamW with one parameter group per entry, without parameters that need no gradients.

    Raises ConfigError for trained weights below float32, unless `has_master_weights`: the engine steps float32
    copies of them. A weight in bfloat16 has 8 bits, so steps below 1/256 of it are lost.
    """
    trained_groups = [{"params": [p for p in group if p.requires_grad]} for group in groups]
    weights = [parameter for group in trained_groups for parameter in group["params"]]
    low_precision = [weight for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)]
    if low_precision and not has_master_weights:
        raise ConfigError(
            f"model.dtype: {len(low_precision)} of {len(weights)} trained tensors are in "
            f"{str(low_precision[0].dtype).removeprefix('torch.')}, where most steps are smaller than the rounding and "
            "are lost; set model.dtype=float32 (engine.mixed_precision=bf16 computes in bf16 all the same), train an "
            "adapter (model.lora.r), whose base may be in bfloat16, or run under DeepSpeed in bf16, which keeps "
            "float32 copies"
        )
    return torch.optim.AdamW(
        trained_groups,
        lr=config.learning_rate,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=torch.cuda.is_available() or None,  # without the temporary copy of all weights
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Set one rate per parameter group; called before every step, so there is no scheduler state to save."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def scheduled_rate(
    peak: float, config: OptimConfig, step: int, num_steps: int, warmup_steps: int | None = None
) -> float:
    """Return the learning rate of a step.

    Raises ConfigError when the warm-up is as long as the run.

    Args:
        peak: the highest rate.
        config: the schedule.
        step: 0 <= step < num_steps.
        num_steps: optimizer steps of the run.
        warmup_steps: replaces the config's; None keeps it.
    """
    warmup = config.warmup_steps if warmup_steps is None else warmup_steps
    if warmup >= num_steps:
        key = "optim.warmup_steps" if warmup_steps is None else "critic.warmup_steps"
        raise ConfigError(f"{key} is {warmup}, it must be below the number of steps, {num_steps}")
    return peak * learning_rate_factor(step, num_steps, warmup, config.schedule)
