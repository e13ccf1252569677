"""Zero and unit of a reward model's score, from its scores of held-out references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from drpo.config import ConfigError, replaced
from drpo.data.encode import Example
from drpo.data.load import DataConfig, load_examples
from drpo.data.noise import NoiseConfig
from drpo.data.records import DataError
from drpo.run.folder import RunFolder
from drpo.tensors import pad_batch
from drpo.trainers.offline import chunks
from reward_models.model import RewardModel


def load_references(data: DataConfig, own: DataConfig | None, number: int, tokenizer) -> list[Example]:
    """Load the first `number` prompts with a response each: of data of their `own`, or held-out ones of `data`.

    Raises DataError when one of them has no response, or nothing is held out.
    """
    if number == 0:
        return []
    if own is not None:
        references = load_examples(own, tokenizer, "prompts").train[:number]
    else:
        without_noise = replaced(data, noise=NoiseConfig())  # noise is for pairs
        references = load_examples(without_noise, tokenizer, "prompts", held_out_only=True).eval[:number]
    advice = "give other data in `references`, or set score.num_references=0"
    if not references:
        raise DataError(f"no held-out prompts are left to be references: {advice}")
    for reference in references:
        if reference.completion_ids is None:
            raise DataError(f"{reference.record.origin} has no response that could be a reference; {advice}")
    return references


def normalise(
    run: RunFolder,
    trained: nn.Module,
    model: RewardModel,
    references: Sequence[Example],
    pad_id: int,
    unit_variance: bool,
) -> None:
    """Set `centre` and `scale` of the model's config, so that the references score 0 on average.

        score = (raw score - centre) / scale

    centre is the mean of the raw scores, scale their standard deviation (divisor n - 1), or 1 without `unit_variance`.
    Source: Stiennon et al. 2020, section 3.4 (the zero); Ziegler et al. 2019, section 2.1 (zero and unit). Raises
    ConfigError when all references have the same score.

    Args:
        run: the folder of the run, with recipe and engine.
        trained: the prepared module that `model` is a part of.
        model: the reward model.
        references: held-out prompts with their responses.
        pad_id: id of padding.
        unit_variance: whether the scale is set.
    """
    with run.engine.whole_weights(trained):
        scores = _raw_scores(run, model, references, pad_id)
    model.config.centre = float(scores.mean())
    said = f"{len(references)} references scored {model.config.centre:.4f} on average"
    if unit_variance:
        deviation = float(scores.std()) if len(scores) > 1 else 0.0
        if deviation == 0:
            raise ConfigError(
                f"score.unit_variance: all {len(scores)} references have the same score, so there is no unit; set it "
                "to false, or give more of them"
            )
        model.config.scale = deviation
        said += f", with standard deviation {deviation:.4f}"
    run.say(f"{said}; they now have {'mean 0 and deviation 1' if unit_variance else 'mean 0'}")


@torch.no_grad()
def _raw_scores(
    run: RunFolder, model: RewardModel, references: Sequence[Example], pad_id: int
) -> torch.Tensor:
    engine = run.engine
    local: list[float] = []
    for part in chunks(references[engine.rank :: engine.world_size], run.recipe.batch.microbatch_size):
        batch = pad_batch([e.query_ids for e in part], [e.completion_ids for e in part], pad_id)
        with engine.autocast():
            local += model.score(batch.to(engine.device)).double().tolist()
    return torch.tensor(engine.gather_objects(local), dtype=torch.float64)
