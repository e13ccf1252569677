"""A run sized for GPUs and a launcher, and the launchers that it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drpo.config import ConfigError
from drpo.models.four_bit import NOT_CUT
from drpo.trainers.offline import OfflineRecipe
from drpo.trainers.online_recipe import OnlineRecipe
from launch.planning.gpus import GIB, Gpus
from launch.planning.launchers import Launcher
from launch.planning.models import Precision, reward_model_names
from launch.planning.phases import Step, dry_optimizer_step, dry_step, rows_key
from launch.planning.sharding import Parts, device_memory, host_memory


@dataclass(frozen=True)
class Plan:
    """The memory of one run under one launcher."""

    launcher: Launcher
    gpus: Gpus
    step: Step
    phases: Mapping[str, Parts]
    "Bytes on one GPU by phase and part."
    host: Parts
    "Bytes of one machine by part."

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes on one GPU in that phase."""
        return self.total(self.peak_phase)

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.peak <= self.gpus.usable

    def total(self, phase: str) -> int:
        """Return the bytes on one GPU in a phase."""
        return sum(self.phases[phase].values())

    def as_json(self) -> dict[str, Any]:
        """Return everything as numbers of GiB."""
        return {
            "accelerate": self.launcher.name,
            "processes": self.launcher.sharding.num_processes,
            "peak_gib": self.peak / GIB,
            "peak_phase": self.peak_phase,
            "usable_gib": self.gpus.usable / GIB,
            "fits": self.fits,
            "notes": list(self.step.notes),
            "phases_gib": {
                name: {part: size / GIB for part, size in parts.items()}
                for name, parts in self.phases.items()
            },
            "logits_chunk_gib": {
                phase.name: phase.logits / GIB for phase in self.step.phases if phase.logits
            },
            "host_gib": {part: size / GIB for part, size in self.host.items()},
            "parameters": {
                name: weights.trained + weights.frozen for name, weights in self.step.weights.items()
            },
            "trained_parameters": {name: weights.trained for name, weights in self.step.weights.items()},
        }


class Planner:
    """Plans of one recipe; dry runs that several launchers share are done once."""

    def __init__(self, recipe: OfflineRecipe | OnlineRecipe, gpus: Gpus) -> None:
        self.recipe, self.gpus = recipe, gpus
        self._steps: dict[tuple, Step] = {}

    def plan(self, launcher: Launcher) -> Plan:
        """Size the run under a launcher; raise ConfigError when its rows do not divide over the processes."""
        sharding = launcher.sharding
        bf16 = (self.recipe.engine.mixed_precision or launcher.precision) == "bf16"
        precision = Precision(bf16, casts_weights=bf16 and launcher.deepspeed)
        num_processes = sharding.num_processes
        if not can_run(self.recipe, launcher):
            raise ConfigError(NOT_CUT)
        _check_divides(self.recipe, num_processes)
        key = (precision, rows_key(self.recipe, num_processes))
        if key not in self._steps:
            self._steps[key] = dry_step(self.recipe, precision, num_processes)
        step = self._steps[key]
        num_trained = sum(weights.trained for weights in step.weights.values())
        share = -(-num_trained // num_processes) if sharding.zero_stage else num_trained
        last = dry_optimizer_step(self.recipe, share, on_gpu=True)
        here = min(num_processes, self.gpus.count)
        waiting = _waiting(self.recipe)
        phases = device_memory(step.weights, [*step.phases, last], sharding, waiting=waiting)
        host = host_memory(step.weights, sharding, here, waiting)
        return Plan(launcher, self.gpus, step, phases, host)


def can_run(recipe: OfflineRecipe | OnlineRecipe, launcher: Launcher) -> bool:
    """Return whether a launcher that cuts weights over the processes meets weights that may be cut."""
    return not (recipe.model.load_in_4bit and launcher.sharding.zero_stage == 3)


def _waiting(recipe: OfflineRecipe | OnlineRecipe) -> dict[str, str]:
    """Return the models that wait on the host, and the phase that needs them."""
    if not isinstance(recipe, OnlineRecipe):
        return {}
    reward = dict.fromkeys(reward_model_names(recipe), "reward") if recipe.reward.offload else {}
    return reward | ({"reference": "scoring"} if recipe.kl.offload_reference else {})


def _check_divides(recipe: OfflineRecipe | OnlineRecipe, num_processes: int) -> None:
    if isinstance(recipe, OnlineRecipe):
        name, size = (
            "rollout.batch_size / ppo.num_minibatches",
            recipe.rollout.batch_size // recipe.ppo.num_minibatches,
        )
    else:
        name, size = "batch.size", recipe.batch.size
    if size % num_processes:
        raise ConfigError(f"{name} is {size}, which does not divide over {num_processes} processes")


def advice(plan: Plan, recipe: OfflineRecipe | OnlineRecipe) -> list[str]:
    """Return what to change where a run does not fit, what saves most first."""
    parts, online = plan.phases[plan.peak_phase], isinstance(recipe, OnlineRecipe)
    suggestions: list[tuple[int, str]] = []
    activations, trained = parts.get("activations", 0), parts.get("gradients", 0) + parts.get("optimizer", 0)
    if plan.peak_phase == "update":
        if not recipe.model.gradient_checkpointing:
            suggestions.append((activations, "model.gradient_checkpointing=true: recomputes activations"))
        section = recipe.ppo if online else recipe.batch
        key = "ppo" if online else "batch"
        if section.microbatch_tokens:
            suggestions.append(
                (activations // 2, f"{key}.microbatch_tokens={section.microbatch_tokens // 2}")
            )
        elif section.microbatch_size > 1:
            suggestions.append((activations // 2, f"{key}.microbatch_size={section.microbatch_size // 2}"))
    if plan.peak_phase == "rollout" and recipe.rollout.generation_batch_size > 1:
        half = recipe.rollout.generation_batch_size // 2
        suggestions.append((parts.get("key-value cache", 0) // 2, f"rollout.generation_batch_size={half}"))
    if plan.peak_phase == "reward" and recipe.reward.batch_size > 1:
        suggestions.append((activations // 2, f"reward.batch_size={recipe.reward.batch_size // 2}"))
    can_adapt = not recipe.model.lora.r and recipe.model.path is not None and "policy" in plan.step.weights
    if can_adapt:
        suggestions.append(
            (trained, "model.lora.r=64: trains an adapter; no gradients and moments of the other weights")
        )
    if recipe.model.lora.r and recipe.model.dtype == "float32":
        frozen = sum(weights.frozen_bytes for weights in plan.step.weights.values())
        suggestions.append((frozen // 4, "model.dtype=bfloat16: the frozen base, embeddings too"))
    can_round = (
        recipe.model.lora.r
        and not recipe.model.load_in_4bit
        and plan.launcher.sharding.zero_stage < 3
        and not getattr(recipe, "reference_moves", False)
    )
    if can_round:  # a quarter of bf16, and embeddings stay
        frozen = sum(weights.frozen_bytes for weights in plan.step.weights.values() if weights.trained)
        suggestions.append((frozen * 2 // 3, "model.load_in_4bit=true: the frozen linear layers in 4 bits"))
    rewards = sum(parts.get(name, 0) for name in reward_model_names(recipe)) if online else 0
    if rewards and recipe.reward.dtype == "float32":
        suggestions.append((rewards // 2, "reward.dtype=bfloat16"))
    if rewards and not recipe.reward.offload and plan.peak_phase != "reward":
        suggestions.append((rewards, "reward.offload=true: the reward model waits on the host"))
    if online and not recipe.kl.offload_reference and plan.peak_phase != "scoring":
        suggestions.append(
            (parts.get("reference", 0), "kl.offload_reference=true: the reference waits on the host")
        )
    return [text for saved, text in sorted(suggestions, key=lambda each: -each[0]) if saved > 0]
