"""Best-of-n curves: a policy's samples, of which each reward model picks the best, against their true reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.config import ConfigError
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.models.tokenizer import load_tokenizer
from drpo.reward_functions import import_functions
from drpo.rewards import Completion
from eval.completions.complete import complete_policy, requests_of
from eval.completions.recipe import CompleteRecipe
from eval.completions.rows import read_completions
from eval.progress import Say
from eval.reward_models.measure import plain
from eval.reward_models.models import LoadedModel
from eval.reward_models.pairs import checked_scores, completion_of
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from eval.statistics.best_of_n import expected_best, kl_bound
from eval.statistics.intervals import mean_interval

SYSTEM = "policy"


@dataclass(frozen=True)
class Samples:
    """N samples for each of P prompts, one prompt after the other, and their true rewards (P, N), if known."""

    completions: list[Completion]
    num_responses: int
    true_rewards: NDArray[np.float64] | None


def sample(recipe: EvaluateRewardModelRecipe, engine: Engine, say: Say) -> Samples:
    """Sample the policy of recipe.best_of_n, or read the samples of an earlier run, and compute their true rewards.

    Raises ConfigError, before sampling, for data of one prompt: intervals are over prompts.
    """
    settings = recipe.best_of_n
    complete = CompleteRecipe(
        run_dir=str(Path(recipe.run_dir) / "best_of_n"),
        policy=settings.policy,
        system=SYSTEM,
        dtype=recipe.dtype,
        mixed_precision=engine.precision,
        data=recipe.data,
        split=recipe.split,
        num_prompts=settings.num_prompts,
        num_responses=settings.num_responses,
        seed=settings.seed,
        max_response_length=settings.max_response_length,
        sampling={"temperature": settings.temperature},
        batch_size=recipe.batch_size,
    )
    tokenizer = with_stop_token(load_tokenizer(settings.policy), recipe.data)
    requests, _ = requests_of(complete, tokenizer)  # the seeds of a prompt follow each other
    if len(requests) == settings.num_responses:
        raise ConfigError(
            f"best_of_n.policy: the {recipe.split} split of the data has one prompt, and a curve with intervals needs "
            "two or more; give more data (data.path, split, data.eval_fraction), or best_of_n.policy=null"
        )
    rows = {row.key: row for row in read_completions(complete_policy(complete, engine, say))}
    completions = []
    for request in requests:
        row = rows[request.key(SYSTEM)]
        completions.append(completion_of(request.example, row.response, row.meta["response_ids"], row.ended))
    true_rewards = None
    if settings.true_reward is not None:
        functions = import_functions({"true_reward": settings.true_reward}, "best_of_n")
        scores = checked_scores(functions["true_reward"], completions, "best_of_n.true_reward")
        true_rewards = scores.reshape(-1, settings.num_responses)
    return Samples(completions, settings.num_responses, true_rewards)


def best_of_n(model: LoadedModel, samples: Samples, confidence: float) -> dict[str, Any]:
    """Compute the curves of one model: by n, the KL bound, its own score of its pick, and the true reward of that."""
    proxy = checked_scores(model.score, samples.completions, model.key).reshape(-1, samples.num_responses)
    kl = kl_bound(np.arange(1, samples.num_responses + 1))
    curves = {"score": curve(expected_best(proxy, proxy), confidence)}
    if samples.true_rewards is not None:
        curves["true_reward"] = curve(expected_best(proxy, samples.true_rewards), confidence)
        # The most that any choice among the samples could reach.
        curves["true_best"] = curve(expected_best(samples.true_rewards, samples.true_rewards), confidence)
    return plain(
        {"num_prompts": len(proxy), "n": list(range(1, len(kl) + 1)), "kl_bound": list(kl), "curves": curves}
    )


def curve(values: NDArray[np.float64], confidence: float) -> Sequence[dict[str, Any]]:
    """Return the mean over prompts, with its interval, of values (P, N) at each n."""
    return [plain(mean_interval(column, confidence=confidence)) for column in values.T]
