"""The recipe of preference training: DPO and its family, one section a choice, and which choices go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drpo.data.views import View
from drpo.rollout.held_out import SampleConfig
from drpo.trainers.offline import OfflineRecipe
from drpo.trainers.preference.curriculum import CurriculumConfig

LossName = Literal[
    "dpo", "cdpo", "robust", "hinge", "ipo", "ipo_avg", "apo_zero", "apo_down", "sppo", "simpo", "orpo", "kto"
]  # fmt: skip
OF_THE_MARGIN = ("dpo", "cdpo", "robust", "hinge")  # functions of h alone: offsets and divergences change h
LENGTH_AVERAGED = ("ipo_avg", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
METRICS = frozenset(
    "accuracy reward_margin chosen_reward rejected_reward chosen_logprobs rejected_logprobs implicit_kl weight "
    "pair_loss pair_loss_p10 pair_loss_p50 pair_loss_p90 "
    "reward reward_desirable reward_undesirable desirable reference_point".split()
)
"What an evaluation may report besides the loss and the samples."


@dataclass(frozen=True)
class OffsetConfig:
    """ODPO: the margin must exceed alpha f(score gap). The scores stand beside the pairs in the data."""

    alpha: float = 1.0
    """Scale of the offset; 0 is DPO."""
    scale: Literal["identity", "log", "log1p"] = "log"
    """f. log is the released one: negative for gaps below 1."""
    on_nonpositive: Literal["refuse", "leave_out", "no_offset"] = "refuse"
    """What happens to a pair whose chosen response has no higher score: the run stops; the pair is left out of
    training; it is trained without offset. Counted in every case."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"loss.offset.alpha must be >= 0, got {self.alpha}")


@dataclass(frozen=True)
class DrDPOConfig:
    """Dr. DPO: pairs of small loss count more, w = softmax(-loss / beta_prime), against flipped labels."""

    beta_prime: float = 1.0
    """Temperature of the weights: infinity weighs all pairs alike, 0 leaves the pair of smallest loss."""
    over: Literal["step", "microbatch"] = "step"
    """Where the weights sum to 1: over the optimizer step of all processes, at the price of a second forward; or
    over each micro-batch of each process, as in the released code."""

    def __post_init__(self) -> None:
        if not self.beta_prime > 0:
            raise ValueError(f"loss.dr_dpo.beta_prime must be > 0, got {self.beta_prime}")


@dataclass(frozen=True)
class TokenWeightsConfig:
    """Token-weighted DPO: log-probabilities of tokens that the data labels irrelevant are scaled by gamma."""

    gamma: float = 0.0
    """Weight of irrelevant tokens; 1 is the loss without weights, 0 leaves them out."""
    labels: Literal["line", "token"] = "line"
    """What a label in chosen_relevance and rejected_relevance stands for."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"loss.token_weights.gamma must be between 0 and 1, got {self.gamma}")


@dataclass(frozen=True)
class LossConfig:
    """The loss of a pair and what is put on top of it."""

    name: LossName = "dpo"
    """dpo; cdpo (label smoothing); robust (rDPO); hinge (SLiC); ipo (summed), ipo_avg (length-averaged); apo_zero,
    apo_down; sppo; simpo, orpo (without reference); kto (single responses, labelled good or bad)."""
    beta: float = 0.1
    """Strength of the KL constraint; scale of the implicit reward. Not for orpo."""
    label_smoothing: float | None = None
    """cdpo, robust: the assumed share of flipped labels."""
    target_margin: float | None = None
    """simpo: gamma, the margin that the scaled log-probabilities must reach."""
    odds_coef: float | None = None
    """orpo: lambda, the weight of the odds ratio beside the likelihood."""
    desirable_weight: float | None = None
    """kto: weight of good responses; null: 1."""
    undesirable_weight: float | None = None
    """kto: weight of bad responses; null: 1."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """f-DPO: the divergence from the reference that is constrained; for dpo, cdpo, robust and hinge."""
    divergence_alpha: float | None = None
    """divergence=alpha: its alpha, between 0 (reverse KL) and 1 (forward KL)."""
    offset: OffsetConfig | None = None
    """ODPO, on dpo, cdpo, robust and hinge; null: none."""
    dr_dpo: DrDPOConfig | None = None
    """Dr. DPO, on every loss of pairs; null: all pairs count alike."""
    token_weights: TokenWeightsConfig | None = None
    """Token weights, on every loss of summed log-probabilities of pairs; null: all tokens count alike."""

    def __post_init__(self) -> None:
        def only_for(key: str, names: tuple[str, ...], needed: bool = True) -> None:
            given = getattr(self, key) is not None
            if given and self.name not in names:
                raise ValueError(f"loss.{key} is for loss.name={'|'.join(names)}, not for {self.name}")
            if needed and not given and self.name in names:
                raise ValueError(f"loss.name={self.name} needs loss.{key}")

        if not self.beta > 0:
            raise ValueError(f"loss.beta must be > 0, got {self.beta}")
        if self.name == "orpo" and self.beta != LossConfig.beta:
            raise ValueError("loss.beta is not for loss.name=orpo, whose weight is loss.odds_coef; drop it")
        only_for("label_smoothing", ("cdpo", "robust"))
        only_for("target_margin", ("simpo",))
        only_for("odds_coef", ("orpo",))
        only_for("desirable_weight", ("kto",), needed=False)
        only_for("undesirable_weight", ("kto",), needed=False)
        only_for("offset", OF_THE_MARGIN, needed=False)
        summed = tuple(n for n in LossName.__args__ if n not in (*LENGTH_AVERAGED, "kto"))
        only_for("token_weights", summed, needed=False)
        only_for("dr_dpo", tuple(n for n in LossName.__args__ if n != "kto"), needed=False)
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        for key in ("odds_coef", "desirable_weight", "undesirable_weight"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise ValueError(f"loss.{key} must be > 0, got {getattr(self, key)}")
        if self.target_margin is not None and self.target_margin < 0:
            raise ValueError(f"loss.target_margin must be >= 0, got {self.target_margin}")
        if self.divergence != "reverse_kl":
            if self.name not in OF_THE_MARGIN:
                raise ValueError(
                    f"loss.divergence is for loss.name={'|'.join(OF_THE_MARGIN)}, not {self.name}"
                )
            if self.token_weights is not None:
                raise ValueError(
                    "loss.divergence other than reverse_kl takes the probability ratio of whole responses, which "
                    "token weights do not leave whole; drop loss.token_weights"
                )
        if (self.divergence == "alpha") != (self.divergence_alpha is not None):
            raise ValueError("loss.divergence=alpha and loss.divergence_alpha go together")
        if self.divergence_alpha is not None and not 0 < self.divergence_alpha < 1:
            raise ValueError(f"loss.divergence_alpha must be between 0 and 1, got {self.divergence_alpha}")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.name not in REFERENCE_FREE


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy that the log-ratios are taken to."""

    path: str | None = None
    """Folder, hub id or GGUF file; null: the policy as training starts (under LoRA its base weights, not a copy)."""
    cache_dir: str | None = None
    """Folder for the log-probabilities of all responses, computed once before training and reused by every run with
    the same reference and data; null: computed in every step."""
    sync_every: int = 0
    """TR-DPO: after every so many steps the reference moves towards the policy; 0: never."""
    sync_mix: float = 1.0
    """How far it moves: reference <- mix * policy + (1 - mix) * reference."""

    def __post_init__(self) -> None:
        if self.sync_every < 0:
            raise ValueError(f"reference.sync_every must be >= 0, got {self.sync_every}")
        if not 0 < self.sync_mix <= 1:
            raise ValueError(f"reference.sync_mix must be above 0 and at most 1, got {self.sync_mix}")
        if self.sync_mix != 1 and not self.sync_every:
            raise ValueError("reference.sync_mix does nothing without reference.sync_every")
        if self.cache_dir is not None and self.sync_every:
            raise ValueError("reference.cache_dir keeps the log-probs of a reference that does not move; drop it or "
                             "reference.sync_every")  # fmt: skip


@dataclass(frozen=True)
class PreferenceRecipe(OfflineRecipe):
    """Everything that decides a run of preference training."""

    run_dir: str = "runs/dpo"
    """Folder of the run."""
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    curriculum: CurriculumConfig | None = None
    """Curry-DPO: pairs from ranked responses, trained from easy to hard; null: the pairs of the data in any order."""
    share_prompts: bool = True
    """Compute the prompt once for both responses of a pair where the architecture allows; false: always twice."""
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if taken := METRICS & set(self.sample.reward_functions):
            raise ValueError(f"sample.reward_functions: {sorted(taken)} are names of other metrics")
        if not self.loss.needs_reference and self.reference != ReferenceConfig():
            raise ValueError(
                f"reference: loss.name={self.loss.name} has no reference policy; drop the section"
            )
        if self.loss.name == "kto" and self.reference.cache_dir is not None:
            raise ValueError(
                "reference.cache_dir holds log-probs of pairs, and loss.name=kto takes single responses"
            )
        if self.loss.name == "kto" and not self.share_prompts:
            raise ValueError(
                "share_prompts is about the two responses of a pair; loss.name=kto takes single ones"
            )
        if self.curriculum is not None:
            if self.loss.name == "kto":
                raise ValueError("curriculum makes pairs, and loss.name=kto takes single responses")
            if self.orders_by_reference and not self.loss.needs_reference:
                raise ValueError(
                    f"curriculum.order=reference_gap: loss.name={self.loss.name} has no reference"
                )
            if self.reference_moves_per_stage and self.reference.cache_dir is not None:
                raise ValueError(
                    "reference.cache_dir keeps the log-probs of a reference that does not move; drop it, or set "
                    "curriculum.reference=initial"
                )
            if self.reference_moves_per_stage and self.reference.sync_every:
                raise ValueError(
                    "curriculum.reference=last and reference.sync_every both move the reference; choose one"
                )

    @property
    def view(self) -> View:
        """What the loss needs of the data."""
        if self.loss.name == "kto":
            return "unpaired"
        return "pairs" if self.curriculum is None else "ranked"

    @property
    def orders_by_reference(self) -> bool:
        """Whether the reference decides the order of the pairs."""
        return self.curriculum is not None and self.curriculum.order == "reference_gap"

    @property
    def reference_is_adapter_off(self) -> bool:
        """Whether the reference is the policy without its adapter: there as soon as the policy is, at no cost."""
        lora_alone = self.model.lora.r > 0 and self.reference.path is None
        return lora_alone and self.loss.needs_reference and not self.reference_moves

    @property
    def reference_moves(self) -> bool:
        """Whether the reference changes during the run."""
        return bool(self.reference.sync_every) or self.reference_moves_per_stage

    @property
    def reference_moves_per_stage(self) -> bool:
        """Whether every stage of a curriculum takes the policy of the stage before as its reference."""
        curriculum = self.curriculum
        several = curriculum is not None and curriculum.reference == "last" and curriculum.num_stages > 1
        return several and self.loss.needs_reference
