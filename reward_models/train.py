"""Train a reward model on preference pairs: Bradley-Terry, then centred on the references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from drpo.config import Section, refuse, replaced, setting
from drpo.data.encode import Example
from drpo.data.load import DataConfig, load_examples
from drpo.data.noise import NoiseConfig
from drpo.data.records import DataError
from drpo.engine import Engine
from drpo.microbatches import Lengths
from drpo.models.loading import load_policy
from drpo.models.positions import check_examples
from drpo.models.probes import can_probe_now, check_scalar_model
from drpo.models.trunk import freeze_trunk
from drpo.preference_losses import bradley_terry_loss
from drpo.run.folder import Callback, RunFolder
from drpo.run.result import Result
from drpo.tensors import PaddedBatch, pad_batch
from drpo.trainers.offline import Objective, OfflineRecipe, RowMetrics, chunks, fit
from drpo.trainers.sft import tokenizer_for
from reward_models.model import Aggregation, RewardModel


@dataclass(frozen=True)
class ScoreConfig(Section):
    """Definition of the score: aggregation, regularisation and zero."""

    aggregation: Aggregation = "last"
    """last: the head at the last response token is the score. sum: the heads at all response tokens are summed."""
    penalty: float = setting(0.0, ge=0)
    """Weight of the mean squared score in the loss; keeps scores near 0."""
    num_centring: int = setting(1024, ge=0)
    """How many references fix the zero of the score (their mean score becomes 0); 0 leaves it where it is."""


@dataclass(frozen=True)
class RewardModelRecipe(OfflineRecipe):
    """All settings of a reward-model run."""

    run_dir: str = "runs/reward_model"
    """Folder of the run."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    references: DataConfig | None = None
    """Data whose completions fix the zero of the score (written like `data`); null: those of `data`."""

    def check(self) -> None:
        super().check()
        refuse(self.model.lora.r > 0, "model.lora.r", "must be 0: a reward model is trained in full")


class RewardObjective(Objective):
    """Bradley-Terry loss over pairs, chosen and rejected in one forward."""

    def __init__(self, model: RewardModel, pad_id: int, score_penalty: float, device: torch.device) -> None:
        super().__init__(model, pad_id, device)
        self._score_penalty = score_penalty

    def collate(self, examples: Sequence[Example]) -> PaddedBatch:
        """Stack the chosen responses on top of the rejected ones: 2 x pairs rows."""
        queries = [example.query_ids for example in examples]
        responses = [e.chosen_ids for e in examples] + [e.rejected_ids for e in examples]
        return pad_batch(queries + queries, responses, self._pad_id).to(self._device)

    def lengths(self, example: Example) -> Lengths:
        return 2 * len(example.query_ids), 2 * max(len(example.chosen_ids), len(example.rejected_ids))

    def num_targets(self, batch: PaddedBatch) -> int:
        return len(batch.responses) // 2

    def forward(self, batch: PaddedBatch) -> tuple[Tensor, RowMetrics]:
        chosen, rejected = self.model.score(batch).chunk(2)
        losses = bradley_terry_loss(chosen, rejected)
        losses = losses + self._score_penalty * (chosen**2 + rejected**2) / 2
        return losses, {
            "accuracy": chosen > rejected,
            "margin": chosen - rejected,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }


def train(recipe: RewardModelRecipe, engine: Engine, callbacks: Sequence[Callback] = ()) -> Path:
    """Run the recipe and return the folder of the reward model."""
    run = RunFolder(recipe, engine, callbacks)
    tokenizer = tokenizer_for(recipe.model, recipe.data)
    splits = load_examples(recipe.data, tokenizer, "pairs")
    run.say_data(splits.report)
    references = load_references(recipe, tokenizer)
    policy = load_policy(recipe.model, tokenizer, recipe.seed)
    run.say(*check_examples(policy, [*splits.train, *splits.eval, *references]))
    model = RewardModel.from_causal_lm(policy, recipe.seed)
    del policy  # its weights were copied
    if can_probe_now(model.backbone):
        check_scalar_model(model, "model.path")
    if recipe.model.trainable_layers is not None:
        freeze_trunk(model, recipe.model.trainable_layers)
    model.config.aggregation = recipe.score.aggregation
    model.config.chat_template = recipe.data.chat_template
    model.config.chat_template_kwargs = dict(recipe.data.chat_template_kwargs)
    objective = RewardObjective(model, tokenizer.pad_token_id, recipe.score.penalty, engine.device)
    result = Result(run, objective, model, tokenizer, splits.report, "reward_model")
    fit(run, objective, [splits.train], splits.eval, name="reward model", result=result)
    if references:
        with engine.whole_weights(objective):
            centre = reference_mean(run, model, references, tokenizer.pad_token_id)
        model.config.centre = centre
        run.say(f"mean score of {len(references)} references was {centre:.4f}; they now score 0 on average")
    return result.finish()


def load_references(recipe: RewardModelRecipe, tokenizer) -> list[Example]:
    """Load the first `score.num_centring` references.

    Raises DataError when one of their prompts has no response.
    """
    if recipe.score.num_centring == 0:
        return []
    data = recipe.references or replaced(recipe.data, noise=NoiseConfig())  # noise is for pairs
    references = load_examples(data, tokenizer, "prompts").train[: recipe.score.num_centring]
    for reference in references:
        if reference.completion_ids is None:
            raise DataError(
                f"{reference.record.origin} has no response that could be a reference; give other data in "
                "`references`, or set score.num_centring=0"
            )
    return references


@torch.no_grad()
def reference_mean(run: RunFolder, model: RewardModel, references: Sequence[Example], pad_id: int) -> float:
    """Return the mean score of the references' completions, which becomes the zero (Huang et al. 2024)."""
    engine, size = run.engine, run.recipe.batch.microbatch_size
    local = references[engine.rank :: engine.world_size]
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for part in chunks(local, size):
        batch = pad_batch([e.query_ids for e in part], [e.completion_ids for e in part], pad_id)
        with engine.autocast():
            total += model.score(batch.to(engine.device)).double().sum()
    return float(engine.sum(total)) / len(references)
