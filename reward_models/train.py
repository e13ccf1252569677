"""Train a reward model on comparisons of responses, then give its score a zero and a unit on the references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from drpo.config import ConfigError, Section, key, refuse, refuse_changed, setting
from drpo.data.load import DataConfig, load_examples
from drpo.engine import Engine
from drpo.models.loading import load_policy, prepare_to_train
from drpo.models.positions import check_examples
from drpo.models.probes import can_probe_now, check_scalar_model
from drpo.models.scoring import head_is_plain
from drpo.run.folder import Callback, RunFolder
from drpo.run.result import Result
from drpo.trainers.offline import OfflineRecipe, fit
from drpo.trainers.sft import tokenizer_for
from reward_models.model import Aggregation, RewardModel
from reward_models.normalisation import load_references, normalise
from reward_models.objective import RewardObjective
from reward_models.rankings import Ranking, pair_rankings, ranked_rankings


@dataclass(frozen=True)
class ScoreConfig(Section):
    """Definition of the score: aggregation, regularisation, zero and unit."""

    RETIRED: ClassVar[dict[str, str]] = {
        "num_centring": "is now score.num_references, taken from held-out data: rename it"
    }
    aggregation: Aggregation = "last"
    """last: the head at the last response token is the score. sum: the heads at all response tokens are summed."""
    penalty: float = setting(0.0, ge=0)
    """Weight of the mean squared score in the loss; keeps scores near 0."""
    num_references: int = setting(1024, ge=0)
    """How many references fix the zero of the score (their mean score becomes 0); 0 leaves it where it is."""
    unit_variance: bool = False
    """Divide scores by the standard deviation of the references' scores, so that KL coefficients and penalties mean the
    same for every reward model."""

    def check(self) -> None:
        rule = f"needs references: set {key('num_references')} to 2 or more"
        refuse(self.unit_variance and self.num_references < 2, "unit_variance", rule)


@dataclass(frozen=True)
class LossConfig(Section):
    """Loss of the comparisons."""

    name: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """bradley_terry: every comparison of two responses counts. plackett_luce: the order of all ranked responses of a
    prompt (data with responses and scores)."""
    by: Literal["pair", "prompt"] = "pair"
    """pair: every pair is an example. prompt: all pairs of a prompt are one, so that they come in one step, share the
    forward over their prompt, and weigh as much as another prompt's."""
    margin_scale: float = setting(0.0, ge=0)
    """Scores must be apart by this much times the gap of the data's scores, for half the loss of equal ones; 0 off."""
    label_smoothing: float = setting(0.0, ge=0, lt=0.5)
    """Rate of wrong labels that the loss expects."""
    lm_coef: float = setting(0.0, ge=0)
    """Weight of the language-model loss of the best response (mean over its tokens), which keeps the backbone's
    features general; 0 off."""

    def check(self) -> None:
        if self.name == "plackett_luce":
            rule = f"does not apply to {key('name')}=plackett_luce, which takes whole rankings"
            refuse_changed(self, ("by", "margin_scale", "label_smoothing"), rule)


@dataclass(frozen=True)
class RewardModelRecipe(OfflineRecipe):
    """All settings of a reward-model run."""

    run_dir: str = "runs/reward_model"
    """Folder of the run."""
    loss: LossConfig = field(default_factory=LossConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    references: DataConfig | None = None
    """Data whose completions fix zero and unit of the score (written like `data`, its train split); null: the held-out
    ones of `data`."""


def train(recipe: RewardModelRecipe, engine: Engine, callbacks: Sequence[Callback] = ()) -> Path:
    """Run the recipe and return the folder of the reward model."""
    run = RunFolder(recipe, engine, callbacks)
    tokenizer = tokenizer_for(recipe.model, recipe.data)
    splits = load_examples(
        recipe.data, tokenizer, "ranked" if recipe.loss.name == "plackett_luce" else "pairs"
    )
    train_rankings, held_out, notes = _rankings(recipe.loss, splits.train, splits.eval)
    report = "\n".join([splits.report, *notes])
    run.take_data(report, splits.train_digest())
    references = load_references(recipe.data, recipe.references, recipe.score.num_references, tokenizer)
    policy = load_policy(recipe.model.without_adapter(), tokenizer, recipe.seed)
    run.say(*check_examples(policy, [*splits.train, *splits.eval, *references]))
    model = RewardModel.from_causal_lm(policy, recipe.seed)
    lm_head = lm_head_of(policy, model) if recipe.loss.lm_coef else None
    del policy  # its other weights were copied
    if can_probe_now(model.backbone):
        check_scalar_model(model, "model.path")
    model.config.aggregation = recipe.score.aggregation
    model.config.chat_template = recipe.data.chat_template
    model.config.chat_template_kwargs = dict(recipe.data.chat_template_kwargs)
    trained = prepare_to_train(model, recipe.model, recipe.seed)
    objective = RewardObjective(
        trained, tokenizer.pad_token_id, recipe.loss, recipe.score.penalty, engine.device, lm_head
    )
    result = Result(run, objective, trained, tokenizer, report, "reward_model")
    fit(run, objective, [train_rankings], held_out, name="reward model", result=result)
    if references:
        unit_variance = recipe.score.unit_variance
        normalise(run, objective, model, references, tokenizer.pad_token_id, unit_variance)
    return result.finish()


def _rankings(
    loss: LossConfig, train_examples: Sequence, held_out: Sequence
) -> tuple[list[Ranking], list[Ranking], list[str]]:
    """Make the examples of the loss, and notes on those that were left out."""
    if loss.name == "plackett_luce":
        (train_rankings, notes), (eval_rankings, eval_notes) = map(
            ranked_rankings, (train_examples, held_out)
        )
        return train_rankings, eval_rankings, notes + eval_notes
    parts = [
        pair_rankings(part, loss.by == "prompt", loss.margin_scale > 0) for part in (train_examples, held_out)
    ]
    names = zip(("train", "eval"), parts, strict=True)
    notes = [f"{name}: one example for each of {len(part)} prompts" for name, part in names]
    return *parts, notes if loss.by == "prompt" else []


def lm_head_of(policy: nn.Module, model: RewardModel) -> nn.Module:
    """Return the output embedding of the policy that `model` was copied from, for the language-model loss.

    It is frozen, or where it is the input embedding too, that of the model. Raises ConfigError when the policy changes
    the logits further.
    """
    if not head_is_plain(policy):
        raise ConfigError(
            f"loss.lm_coef: {type(policy).__name__} changes the logits behind its output embedding, so the "
            "language-model loss would be another one; set it to 0"
        )
    head = policy.get_output_embeddings()
    head.requires_grad_(False)
    if head.weight is policy.get_input_embeddings().weight:
        head.weight = model.backbone.get_input_embeddings().weight
    return head
