"""The recipe of launch/evaluate_reward_model.py: models, pairs, and what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.load import DataConfig
from drpo.trainers.reward_parts import CombineConfig


@dataclass(frozen=True)
class ScoredModel(Section):
    """A reward model, or a preference-trained policy with its reference."""

    path: str = ""
    """Folder or hub id of a reward model; with `reference`, of a policy."""
    name: str | None = None
    """Its name in tables; null: its path."""
    reference: str | None = None
    """The policy that the one at `path` was trained from, whose implicit rewards are measured; null: a reward model."""
    beta: float | None = setting(None, gt=0)
    """The beta of the policy's loss, which gives the implicit rewards their unit."""

    def check(self) -> None:
        refuse(not self.path.strip(), "path", "must name a reward model, or a policy with its reference")
        rule = f"is for implicit rewards and needs {key('reference')}"
        refuse(self.beta is not None and self.reference is None, "beta", rule)
        rule = f"must be given with {key('reference')}: the beta that the policy was trained with"
        refuse(self.beta is None and self.reference is not None, "beta", rule)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or self.path


@dataclass(frozen=True)
class BestOfNConfig(Section):
    """Samples of a policy, of which each model picks the best of n."""

    policy: str | None = None
    """The policy that is sampled: folder, hub id or GGUF file; null: no best-of-n curve."""
    true_reward: str | None = None
    """Python callable as module:function that knows the true reward, such as drpo.data.tasks.demo:true_rewards; null:
    the model's own score alone."""
    num_responses: int = setting(16, ge=2)
    """Samples of each prompt; the curve goes up to this n."""
    num_prompts: int | None = setting(256, ge=2)
    """So many of the prompts, chosen by their hashes; null for all."""
    max_response_length: int = setting(53, ge=1)
    """The most tokens of a sample, stop token included."""
    temperature: float = setting(1.0, gt=0)
    """Temperature of the samples."""
    seed: int = setting(0, ge=0)
    """With the prompt, all that a sample's random numbers depend on."""

    def check(self) -> None:
        if self.policy is None:
            refuse_changed(self, self.changed(), f"needs {key('policy')}")


@dataclass(frozen=True)
class EvaluateRewardModelRecipe(Section):
    """Reward models on pairs of responses."""

    run_dir: str = "runs/evaluate_reward_model"
    """Folder of the results."""
    models: list[ScoredModel] = field(default_factory=list)
    """The reward models, such as seeds of one recipe; each has path, and may have name, or reference and beta."""
    ensembles: list[CombineConfig] = field(default_factory=list)
    """Ways to make one score of all `models`, which is measured like theirs: combine, and coef."""
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "eval"] = "eval"
    """Which split of the data; eval are the held-out pairs. A file that is for evaluation only: train, with
    data.eval_fraction=0."""
    num_pairs: int | None = setting(None, ge=2)
    """So many of the pairs, chosen by the hashes of their texts; null for all."""
    subsets: list[str] = field(default_factory=list)
    """Columns of the data by whose values the accuracy is also computed; extra.confidence is a field of a column."""
    num_bins: int = setting(10, ge=2)
    """Bins of the reliability diagram, and of numbers that have more values than this."""
    confidence: float = setting(0.95, gt=0, lt=1)
    """Level of the intervals."""
    num_references: int = setting(1024, ge=0)
    """How many of the data's own best responses check the normalisation; 0: none."""
    num_alone: int = setting(32, ge=0)
    """How many pairs are scored again, one response at a time, to check that batches change nothing; 0: none."""
    best_of_k: str | None = None
    """A file of rows with prompt, and lists chosen and rejected (RewardBench 2), or a hub id; null: none."""
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Autocast precision; no is float32. null takes bf16 on a GPU or CPU that has instructions for it, else float32."""
    batch_size: int = setting(32, ge=1)
    """Responses per forward."""

    def check(self) -> None:
        labels = [model.label for model in self.models]
        self._check_labels([*labels, *map(ensemble_label, self.ensembles)])
        self._check_ensembles()
        for column in self.subsets:
            refuse(self.subsets.count(column) > 1, "subsets", f"names {column} twice; give each column once")

    def _check_labels(self, labels: Sequence[str]) -> None:
        for index, label in enumerate(labels):
            place = f"models[{index}].name" if index < len(self.models) else "ensembles"
            refuse(label in labels[:index], place, f"must differ, got {label!r} twice")

    def _check_ensembles(self) -> None:
        sources = [(model.path, model.reference) for model in self.models]
        rule = "names a model twice, which adds nothing to an ensemble"
        refuse(bool(self.ensembles) and len(set(sources)) < len(sources), "models", rule)
        are_implicit = [model.reference is not None for model in self.models]
        refuse(
            bool(self.ensembles) and len(self.models) < 2, "ensembles", f"needs two or more {key('models')}"
        )
        rule = (
            "needs models of one kind: implicit rewards and scores have no common unit; evaluate them apart"
        )
        refuse(bool(self.ensembles) and len(set(are_implicit)) > 1, "ensembles", rule)
        others = [ensemble.combine for ensemble in self.ensembles if ensemble.combine != "mean"]
        rule = f"must be mean: implicit rewards are known up to a number for each prompt, got {others}"
        refuse(bool(others) and any(are_implicit), "ensembles", rule)


def ensemble_label(ensemble: CombineConfig) -> str:
    """Return the name of an ensemble of all models in tables."""
    coef = f", coef {ensemble.coef:g}" if ensemble.combine.startswith("mean_minus") else ""
    return f"{ensemble.combine} of all{coef}"
