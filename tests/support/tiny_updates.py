"""A real tiny actor-critic on a real engine, and a batch of rollouts of ragged lengths measured by it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from drpo.engine import Engine, EngineConfig
from drpo.models.actor_critic import ActorCritic
from drpo.models.scalar_head import ScalarModel
from drpo.rewards import RunningMoments
from drpo.rollout.trajectory import Trajectory
from drpo.tensors import pad_batch
from drpo.trainers.credit import AdvantageConfig, Credit, KLConfig, ShapingConfig, assign_credit
from drpo.trainers.finite import finite_or_stop
from drpo.trainers.ppo_update import PPOConfig, UpdateSettings, ppo_update

PAD = 2
FIRST_ROW_ID = 30  # row i has the query (FIRST_ROW_ID + i, ...), so a forward tells which rows it got
LENGTHS = (6, 3, 8, 1, 5, 7, 2, 4)
FORCED = (3, 0, 7, 0, 2, 0, 1, 0)
MAX_RESPONSE_LENGTH = 10


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


@dataclass
class Update:
    """An update about to happen, with what it did recorded by hooks."""

    engine: Engine
    model: nn.Module
    trajectory: Trajectory
    credit: Credit
    run_dir: Path
    optimizer: torch.optim.Optimizer
    minibatches: list[list[int]] = field(default_factory=list)
    """Rows of the forwards before each optimizer step."""
    forwards: list[list[int]] = field(default_factory=list)
    """Rows of each forward."""
    widths: list[int] = field(default_factory=list)
    """Response positions of each forward."""
    _open: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer.register_step_pre_hook(self._on_step)
        self.model.register_forward_pre_hook(self._on_forward)

    def _on_forward(self, module: nn.Module, args: tuple) -> None:
        rows = (args[0][:, -2] - FIRST_ROW_ID).tolist()
        self.forwards.append(rows)
        self.widths.append(args[2].shape[1])
        self._open += rows

    def _on_step(self, *_) -> None:
        self.minibatches.append(self._open)
        self._open = []

    def run(
        self, *, train_policy: bool = True, sft_coef: float = 0.0, seed: int = 0, step: int = 1, **config
    ) -> dict[str, float]:
        config = {"num_epochs": 1, "num_minibatches": 1, "microbatch_size": 4, **config}
        return ppo_update(
            self.engine,
            self.model,
            self.trajectory,
            self.credit,
            UpdateSettings(PPOConfig(**config), MAX_RESPONSE_LENGTH, sft_coef, train_policy),
            (seed, step),
            functools.partial(finite_or_stop, self.engine, self.run_dir, step),
        )

    def weights(self, part: str = "") -> Tensor:
        """All weights under `part` ("policy", "critic" or both) as one vector."""
        named = self.model.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if name.startswith(part)]).clone()


def tiny_update(
    run_dir: Path,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    max_grad_norm: float | None = None,
    lengths: Sequence[int] = LENGTHS,
    forced: Sequence[int] = FORCED,
    masking: str = "paper",
    whiten: bool = True,
    off_policy: float = 0.0,
) -> Update:
    """The same models and rollouts in every call.

    `off_policy` is the standard deviation of noise on the old log-probs and values.
    """
    policy = tiny_model("gpt_neox", seed=1)
    actor_critic = ActorCritic(policy, ScalarModel.from_causal_lm(policy, seed=3), temperature=0.7)
    trajectory = measured_rollouts(actor_critic, lengths, forced, off_policy)
    advantage = AdvantageConfig(gamma=1.0, lam=0.95, whiten=whiten)
    shaping = ShapingConfig(missing_stop="none")
    credit = assign_credit(trajectory, shaping, KLConfig(), 0.05, advantage, masking, RunningMoments())
    engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), run_dir, 0, max_grad_norm)
    raw_optimizer = optimizer(actor_critic)
    model = engine.prepare(actor_critic, raw_optimizer)
    return Update(engine, model, trajectory, credit, run_dir, raw_optimizer)


def measured_rollouts(
    actor_critic: ActorCritic, lengths: Sequence[int], forced: Sequence[int], off_policy: float = 0.0
) -> Trajectory:
    """Rows of random tokens with the actor-critic's own log-probs, entropies and values."""
    generator = torch.Generator().manual_seed(5)

    def ids(number: int) -> list[int]:
        return torch.randint(3, 30, (number,), generator=generator).tolist()

    queries = [[*ids(1 + row % 3), FIRST_ROW_ID + row, 4] for row in range(len(lengths))]
    batch = pad_batch(queries, [ids(length) for length in lengths], PAD)
    with torch.no_grad():
        logprobs, entropy, values = actor_critic(
            batch.queries, batch.query_mask, batch.responses, batch.response_mask
        )

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(logprobs.shape, generator=generator)

    return Trajectory(
        queries=batch.queries,
        query_mask=batch.query_mask,
        responses=batch.responses,
        response_mask=batch.response_mask,
        reset_lengths=torch.tensor(forced),
        source_lengths=torch.tensor(
            [length + 1 if h else 0 for h, length in zip(forced, lengths, strict=True)]
        ),
        ended=torch.ones(len(lengths), dtype=torch.bool),
        scores=torch.randn(len(lengths), generator=generator),
        logprobs=logprobs + noise(off_policy),
        ref_logprobs=logprobs + noise(0.5),
        values=values + noise(off_policy),
        entropy=entropy,
    )
