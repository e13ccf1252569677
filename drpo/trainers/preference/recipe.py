"""The recipe of preference training: DPO and its family, a section per choice, and the valid combinations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.views import View
from drpo.rollout.held_out import SampleConfig
from drpo.trainers.offline import OfflineRecipe
from drpo.trainers.preference.curriculum import CurriculumConfig

LossName = Literal[
    "dpo", "cdpo", "robust", "hinge", "ipo", "ipo_avg", "apo_zero", "apo_down", "sppo", "simpo", "orpo", "kto"
]  # fmt: skip
OF_THE_MARGIN = ("dpo", "cdpo", "robust", "hinge")  # functions of h: offsets and divergences change h
LENGTH_AVERAGED = ("ipo_avg", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
OF_PAIRS = tuple(name for name in get_args(LossName) if name != "kto")
LOSSES_OF = {
    "label_smoothing": ("cdpo", "robust"),
    "target_margin": ("simpo",),
    "odds_coef": ("orpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "offset": OF_THE_MARGIN,
    "divergence": OF_THE_MARGIN,
    "token_weights": tuple(name for name in OF_PAIRS if name not in LENGTH_AVERAGED),
    "dr_dpo": OF_PAIRS,
}
"Settings of `loss` that some losses alone have, and those losses."
REQUIRED = ("label_smoothing", "target_margin", "odds_coef")
PAIRS_ONLY = "is about pairs of responses, and loss.name=kto takes single ones; drop it"
METRICS = frozenset(
    "accuracy reward_margin chosen_reward rejected_reward chosen_logprobs rejected_logprobs implicit_kl weight "
    "pair_loss pair_loss_p10 pair_loss_p50 pair_loss_p90 "
    "reward reward_desirable reward_undesirable desirable reference_point".split()
)
"What an evaluation may report besides the loss and the samples."


@dataclass(frozen=True)
class OffsetConfig(Section):
    """ODPO: the margin must exceed alpha f(score gap), with the scores of the pairs in the data."""

    alpha: float = setting(1.0, ge=0)
    """Scale of the offset; 0 is DPO."""
    scale: Literal["identity", "log", "log1p"] = "log"
    """f. log is the released one: negative for gaps below 1."""
    on_nonpositive: Literal["refuse", "leave_out", "no_offset"] = "refuse"
    """What happens to a pair whose chosen response has no higher score: the run stops; the pair is left out of
    training; it is trained without offset. Counted in every case."""


@dataclass(frozen=True)
class DrDPOConfig(Section):
    """Dr. DPO: pairs of small loss count more, w = softmax(-loss / beta_prime), against flipped labels."""

    beta_prime: float = setting(1.0, gt=0)
    """Temperature of the weights: infinity weighs all pairs alike, 0 leaves the pair of smallest loss."""
    over: Literal["step", "microbatch"] = "step"
    """Where the weights sum to 1: over the optimizer step of all processes, at the price of a second forward; or
    over each micro-batch of each process, as in the released code."""


@dataclass(frozen=True)
class TokenWeightsConfig(Section):
    """Token-weighted DPO: log-probabilities of tokens that the data labels irrelevant are scaled by gamma."""

    gamma: float = setting(0.0, ge=0, le=1)
    """Weight of irrelevant tokens; 1 is the loss without weights, 0 leaves them out."""
    labels: Literal["line", "token"] = "line"
    """Unit of a label in chosen_relevance and rejected_relevance."""


@dataclass(frozen=True)
class LossConfig(Section):
    """The loss of a pair and its extensions."""

    name: LossName = "dpo"
    """dpo; cdpo (label smoothing); robust (rDPO); hinge (SLiC); ipo (summed), ipo_avg (length-averaged); apo_zero,
    apo_down; sppo; simpo, orpo (without reference); kto (single responses, labelled good or bad)."""
    beta: float = setting(0.1, gt=0)
    """Strength of the KL constraint; scale of the implicit reward. Not for orpo."""
    label_smoothing: float | None = setting(None, ge=0, lt=0.5)
    """cdpo, robust: the assumed share of flipped labels."""
    target_margin: float | None = setting(None, ge=0)
    """simpo: gamma, the margin that the scaled log-probabilities must reach."""
    odds_coef: float | None = setting(None, gt=0)
    """orpo: lambda, the weight of the odds ratio, added to the likelihood."""
    desirable_weight: float | None = setting(None, gt=0)
    """kto: weight of good responses; null: 1."""
    undesirable_weight: float | None = setting(None, gt=0)
    """kto: weight of bad responses; null: 1."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """f-DPO: the divergence from the reference that is constrained; for dpo, cdpo, robust and hinge."""
    divergence_alpha: float | None = setting(None, gt=0, lt=1)
    """divergence=alpha: its alpha, between 0 (reverse KL) and 1 (forward KL)."""
    offset: OffsetConfig | None = None
    """ODPO, on dpo, cdpo, robust and hinge; null: none."""
    dr_dpo: DrDPOConfig | None = None
    """Dr. DPO, on every loss of pairs; null: all pairs count alike."""
    token_weights: TokenWeightsConfig | None = None
    """Token weights, on every loss of summed log-probabilities of pairs; null: all tokens count alike."""

    def check(self) -> None:
        if self.name == "orpo":
            rule = f"is not for {key('name')}=orpo, whose weight is {key('odds_coef')}; drop it"
            refuse_changed(self, ["beta"], rule)
        for name, losses in LOSSES_OF.items():
            if self.name not in losses:
                refuse_changed(self, [name], f"is for {key('name')}={'|'.join(losses)}, not for {self.name}")
            elif name in REQUIRED:
                rule = f"must be given for {key('name')}={self.name}"
                refuse(getattr(self, name) is None, name, rule)
        if self.divergence != "reverse_kl":
            rule = (
                f"does not go with {key('divergence')}={self.divergence}, which takes the probability ratio of whole "
                "responses; drop one"
            )
            refuse(self.token_weights is not None, "token_weights", rule)
        rule = f"and {key('divergence')}=alpha go together; give both or neither"
        refuse((self.divergence == "alpha") != (self.divergence_alpha is not None), "divergence_alpha", rule)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return self.name not in REFERENCE_FREE


@dataclass(frozen=True)
class ReferenceConfig(Section):
    """The reference policy of the log-ratios."""

    path: str | None = None
    """Folder, hub id or GGUF file; null: the policy as training starts (under LoRA its base weights, not a copy)."""
    cache_dir: str | None = None
    """Folder for the log-probabilities of all responses, computed once before training and reused by every run with
    the same reference and data; null: computed in every step."""
    sync_every: int = setting(0, ge=0)
    """TR-DPO: after every so many steps the reference moves towards the policy; 0: never."""
    sync_mix: float = setting(1.0, gt=0, le=1)
    """How far it moves: reference <- mix * policy + (1 - mix) * reference."""

    def check(self) -> None:
        if not self.sync_every:
            refuse_changed(self, ["sync_mix"], f"does nothing without {key('sync_every')}")
        rule = f"keeps the log-probs of a reference that does not move; drop it or {key('sync_every')}"
        refuse(self.cache_dir is not None and self.sync_every > 0, "cache_dir", rule)


@dataclass(frozen=True)
class PreferenceRecipe(OfflineRecipe):
    """All settings of a run of preference training."""

    run_dir: str = "runs/dpo"
    """Folder of the run."""
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    curriculum: CurriculumConfig | None = None
    """Curry-DPO: pairs from ranked responses, trained from easy to hard; null: the pairs of the data in any order."""
    share_prompts: bool = True
    """Compute the prompt once for both responses of a pair where the architecture allows; false: always twice."""
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self) -> None:
        super().check()
        for name in self.sample.reward_functions:
            rule = "is the name of another metric; choose another"
            refuse(name in METRICS, f"sample.reward_functions.{name}", rule)
        loss = f"loss.name={self.loss.name}"
        if not self.loss.needs_reference:
            rule = f"does not apply to {loss}, which has no reference policy; drop the section"
            refuse_changed(self, ["reference"], rule)
            rule = f"must not be reference_gap for {loss}, which has no reference policy"
            refuse(self.orders_by_reference, "curriculum.order", rule)
        if self.loss.name == "kto":
            refuse_changed(self.reference, ["cache_dir"], PAIRS_ONLY, "reference.")
            refuse_changed(self, ["share_prompts", "curriculum"], PAIRS_ONLY)
        if self.loss.dr_dpo is not None and self.loss.dr_dpo.over == "microbatch":
            rule = "does not go with loss.dr_dpo.over=microbatch, whose weights are of microbatch_size pairs; drop it"
            refuse_changed(self.batch, ["microbatch_tokens"], rule, "batch.")
        if self.reference_moves_per_stage:
            rule = "keeps the log-probs of a reference that does not move; drop it, or set curriculum.reference=initial"
            refuse(self.reference.cache_dir is not None, "reference.cache_dir", rule)
            rule = "and curriculum.reference=last both move the reference; choose one"
            refuse(self.reference.sync_every > 0, "reference.sync_every", rule)
        rule = (
            "does not go with a reference that moves (reference.sync_every, curriculum.reference=last): that is a "
            "dense copy, which would start from other weights than the policy's; set it to false"
        )
        refuse(self.model.load_in_4bit and self.reference_moves, "model.load_in_4bit", rule)

    @property
    def view(self) -> View:
        """The view of the data that the loss needs."""
        if self.loss.name == "kto":
            return "unpaired"
        return "pairs" if self.curriculum is None else "ranked"

    @property
    def orders_by_reference(self) -> bool:
        """Whether the reference determines the order of the pairs."""
        return self.curriculum is not None and self.curriculum.order == "reference_gap"

    @property
    def reference_is_adapter_off(self) -> bool:
        """Whether the reference is the policy without its adapter, and so needs no memory of its own."""
        lora_alone = self.model.lora.r > 0 and self.reference.path is None
        return lora_alone and self.loss.needs_reference and not self.reference_moves

    @property
    def reference_moves(self) -> bool:
        """Whether the reference changes during the run."""
        return bool(self.reference.sync_every) or self.reference_moves_per_stage

    @property
    def reference_moves_per_stage(self) -> bool:
        """Whether the reference of every stage of a curriculum is the policy of the stage before."""
        curriculum = self.curriculum
        several = curriculum is not None and curriculum.reference == "last" and curriculum.num_stages > 1
        return several and self.loss.needs_reference
