"""Cases of the speed benchmark: the work, what it is measured beside, and the recipe of our side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.experiments.flops import Shape, forward_flops

LEARNING_RATE = 1e-4
ONLINE_LEARNING_RATE = 1e-9
"So small that the rollouts are the same in every step and on both sides."
NUM_RANKED = 4
"Ranked responses to a prompt."
NUM_PAIRS = NUM_RANKED * (NUM_RANKED - 1) // 2
BETA = 0.1
"Of DPO."
FORCED_FRACTION = 0.95
"Least share of a given response that is forced where a rollout's length is to be that of the data."


@dataclass(frozen=True)
class Case:
    """One kind of work."""

    stage: str
    "The launch script: dpo, reward_model, sft or drpo."
    lengths: str
    "Lengths of prompts and responses: even, tldr or chat (speed_inputs.LENGTHS)."
    beside: tuple[str, ...]
    "trl; before: another commit of the project; prompts: PPO, for a case with resets; pairs: each pair an example."
    parts: tuple[str, ...] = ("step",)
    "What is timed: the step; in online cases also learn (all but sampling), update and generate."
    num_batches: int = 1
    "Rows of a step, in multiples of the recipe's batch_size."
    rollouts_per_prompt: int = 1
    num_epochs: int | None = None
    "PPO epochs; None: the recipe's."
    resets: bool = False
    "Whether every rollout of an online case starts from a prefix."
    ranked: bool = False
    "Whether a reward model learns from all pairs of ranked responses to a prompt, in one example."

    trainable_layers: int | None = None
    "Layers that our side trains, the others being frozen; the other side trains all, as it comes."

    @property
    def is_online(self) -> bool:
        return self.stage == "drpo"


CASES = {
    "dpo": Case("dpo", "even", ("trl",)),
    "reward_model": Case("reward_model", "even", ("trl",)),
    "sft": Case("sft", "even", ("trl",)),
    "ppo": Case("drpo", "even", ("trl", "before"), ("step", "learn", "update")),
    "ppo_4_per_prompt": Case("drpo", "even", ("trl", "before"), ("learn", "update"), rollouts_per_prompt=4),
    "ppo_tldr": Case("drpo", "tldr", ("before",), ("learn", "update"), num_epochs=1),
    "ppo_chat": Case("drpo", "chat", ("before",), ("learn", "update"), num_epochs=1),
    "sft_chat": Case("sft", "chat", ("before",)),
    "reward_model_top": Case("reward_model", "even", ("trl",), trainable_layers=2),
    "reward_model_ranked": Case("reward_model", "even", ("pairs",), ranked=True),
    "reward_model_chat": Case("reward_model", "chat", ("before",)),
    "resets": Case("drpo", "even", ("prompts",), ("generate",), num_batches=4, num_epochs=1, resets=True),
}


@dataclass(frozen=True)
class Sizes:
    """Rows of a step, and how they are cut."""

    batch_size: int
    microbatch_size: int
    tokens_per_row: int
    "Prompt and response of a row of median length."
    longest_response: int
    num_steps: int
    num_epochs: int
    precision: str
    seed: int


def our_settings(case: Case, sizes: Sizes, inputs: Path, side: str) -> dict[str, Any]:
    """Return the recipe of our side (`ours`), of an earlier commit (`before`), of PPO (`prompts`), or of `pairs`.

    Uneven rows are cut by tokens on our side, as many as rows of median length have; earlier commits know rows only.
    """
    cut: dict[str, Any] = {"microbatch_size": sizes.microbatch_size}
    if side == "ours" and case.lengths != "even":
        responses = 2 if case.stage == "reward_model" else 1
        cut["microbatch_tokens"] = responses * sizes.microbatch_size * sizes.tokens_per_row
    settings: dict[str, Any] = {
        "seed": sizes.seed,
        "num_steps": sizes.num_steps,
        "data": {"task": "own", "path": str(inputs / data_of(case)), "eval_fraction": 0},
        "model": {"path": str(inputs / policy_of(case))},
        "engine": {"mixed_precision": sizes.precision, "trackers": []},
    }
    if case.trainable_layers is not None:
        settings["model"]["trainable_layers"] = case.trainable_layers
    if case.is_online:
        return settings | _online_settings(case, sizes, cut, str(inputs / "reward_model"), side)
    settings["batch"] = cut | {"size": sizes.batch_size}
    settings["optim"] = {"learning_rate": LEARNING_RATE, "schedule": "constant"}
    if case.ranked:  # as many pairs a step on both sides
        by_prompt, per_example = side == "ours", NUM_PAIRS if side == "pairs" else 1
        settings["loss"] = {"by": "prompt" if by_prompt else "pair"}
        settings["batch"] = {
            "size": per_example * sizes.batch_size // NUM_RANKED,
            "microbatch_size": max(1, sizes.microbatch_size // NUM_RANKED)
            if by_prompt
            else sizes.microbatch_size,
        }
    if case.stage == "reward_model":
        number = "num_centring" if side == "before" else "num_references"  # its name in earlier commits
        return settings | {"score": {number: 0}}
    if case.stage == "dpo":
        settings["loss"] = {"name": "dpo", "beta": BETA}
    return settings | {"sample": {"num_prompts": 0}}


def _online_settings(
    case: Case, sizes: Sizes, cut: Mapping[str, Any], reward_model: str, side: str
) -> dict[str, Any]:
    """Return the sections of an online recipe.

    Args:
        case: the work.
        sizes: of the step.
        cut: micro-batches of the update.
        reward_model: folder of the reward model, from which the critic starts too.
        side: ours, before or prompts.
    """
    reset: dict[str, Any] = {"proportion": 0.0}
    if case.lengths != "even":  # the policy ends what is nearly complete
        reset = {"proportion": 1.0, "min_fraction": FORCED_FRACTION}
    elif case.resets and side != "prompts":
        reset = {"proportion": 1.0}
    return {
        "reward": {"path": reward_model, "shaping": {"missing_stop": "none"}},
        "critic": {"path": reward_model},
        "reset": reset,
        "rollout": {
            "batch_size": sizes.batch_size * case.num_batches,
            "rollouts_per_prompt": case.rollouts_per_prompt,
            "max_response_length": sizes.longest_response,
        },
        "ppo": {**cut, "num_epochs": case.num_epochs or sizes.num_epochs, "num_minibatches": 1},
        "optim": {"learning_rate": ONLINE_LEARNING_RATE, "schedule": "constant"},
        "log": {"samples_every": 0},
    }


def policy_of(case: Case) -> str:
    """Return the folder of the case's policy: in online cases one that never ends a response, or does so at once."""
    if not case.is_online:
        return "policy"
    return "never_stops" if case.lengths == "even" else "stops"


def data_of(case: Case) -> str:
    """Return the name of the case's file of prompts, demonstrations or pairs."""
    rows = "pairs" if case.stage in ("dpo", "reward_model") else "demonstrations"
    rows = "ranked" if case.ranked else rows
    return f"{case.lengths}_{rows}.jsonl"


def work(case: Case, part: str, lengths: Sequence[tuple[int, int]], shape: Shape, num_epochs: int) -> float:
    """Return the operations of a part of a step whose rows have the given lengths of prompt and response.

    It is the work as it was posed: every row by itself, without padding. Less is done where a prompt is shared, more
    where rows are padded or the head reads every token.

    Args:
        case: the kind of work.
        part: one of the case's.
        lengths: prompt and response of every row; a pair has two rows.
        shape: of policy, reference, critic and reward model.
        num_epochs: passes over the rollouts.
    """
    language = sum(forward_flops(shape, *row, shape.vocabulary) for row in lengths)
    scalar = sum(forward_flops(shape, *row, 1) for row in lengths)
    match case.stage:
        case "dpo":  # the policy's forward and backward, the reference's forward
            return 4 * language
        case "sft":
            return 3 * language
        case "reward_model":
            return 3 * scalar
    update = 3 * num_epochs * (language + scalar)
    scoring = 2 * language + 2 * scalar  # policy and reference, critic and reward model
    return {"update": update, "learn": update + scoring, "step": update + scoring + language}[part]
