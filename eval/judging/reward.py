"""A judge as a part of the reward: the share of the win that it gives each rollout over the data's reference.

    reward:
      parts:
      - {name: judge, function: "eval.judging.reward:judge_reward", recipe: judge.yaml, weight: 0.5}

`judge.yaml` is a recipe of launch/judge.py without `completions` and `system`. Its store keeps the answers, so that a
resumed run pays for none of them twice, and its budget holds for the whole run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from drpo.config import ConfigError, load_recipe, names_keys, refuse, refuse_changed, replaced
from drpo.data.records import DataError
from drpo.rewards import Completion, DetailedScores
from drpo.run.stopped import RunStopped
from eval.completions.rows import prompt_id_of
from eval.judging.judge import Outcome
from eval.judging.judge_systems import JudgeRecipe
from eval.judging.judges import KINDS
from eval.judging.matchup import Matchup, Question, questions_of
from eval.judging.openai.pairwise import load_prompt
from eval.judging.verdict import combine_all

BATCH_MINUTES = 24 * 60.0
"A batch of the Batch API is done within a day."
OF_NO_VERDICT = ("base_url", "api_key_env", "backend", "probe")
"Settings of a judge that change no verdict: the model is its own at every address, as at reward.url."


class JudgeReward:
    """RewardFn: 1 for a win over the reference, 0 for a loss, 0.5 for a tie, by the judge of a recipe file."""

    def __init__(self, path: str, recipe: JudgeRecipe) -> None:
        """Read the judge's prompt, if it has one. Raises ConfigError for a recipe that cannot work."""
        self._path, self._recipe = path, recipe
        self.identity: str = _identity(recipe)
        self._own = _share_of_process(recipe)
        _ask(self._own, [])  # the checks of the kind itself: model, prompt, price, store

    @property
    def wait_minutes(self) -> float:
        """The longest wait for the verdict on one question, which is asked again when its answer cannot be read."""
        judge, retry = self._recipe.judge, self._recipe.retry
        if judge.kind != "openai":
            return 0.0
        minutes = BATCH_MINUTES if judge.backend == "batch" else (retry.max_elapsed + retry.timeout) / 60
        return (1 + judge.max_reasks) * minutes

    def __call__(self, completions: Sequence[Completion]) -> DetailedScores:
        """Return the scores (B,), with the detail `undecided`; raise as `judge_reward` says."""
        recipe = self._own
        matchups = [_against_reference(row, completion) for row, completion in enumerate(completions)]
        questions = questions_of(matchups, recipe.orders, recipe.seed)
        outcome = _ask(recipe, questions)
        if outcome.stopped is not None:
            raise RunStopped(f"the judge of {self._path} stopped: {outcome.stopped}")
        num_failed = sum(verdict.status == "failed" for verdict in outcome.verdicts)
        if num_failed > recipe.max_failed * len(questions):
            raise RunStopped(
                f"the judge of {self._path} did not answer {num_failed} of {len(questions)} questions, more than "
                f"max_failed={recipe.max_failed:g}"
            )
        judgments = combine_all(outcome.verdicts, recipe.half_tie, recipe.orders)
        by_row = {judgment.seed: judgment.score for judgment in judgments}
        shares = [by_row.get(row) for row in range(len(completions))]
        undecided = torch.tensor([share is None for share in shares], dtype=torch.float32)
        if float(undecided.mean()) > recipe.max_undecided:
            raise RunStopped(
                f"the judge of {self._path} left {int(undecided.sum())} of {len(shares)} rollouts undecided, more than "
                f"max_undecided={recipe.max_undecided:g}"
            )
        scores = torch.tensor([0.5 if share is None else share for share in shares])
        return DetailedScores(scores, {"undecided": undecided})


def judge_reward(path: str) -> JudgeReward:
    """Return the RewardFn of the judge of a recipe file.

    A rollout that the judge leaves undecided counts 0.5, and the detail `undecided` says how often that was. Raises
    ConfigError for a recipe that cannot work; in the run DataError for a prompt without a reference, and RunStopped
    when the judge stops (its budget is spent), fails more often than `max_failed` or leaves more undecided than
    `max_undecided`.
    """
    try:
        return JudgeReward(path, _checked(load_recipe(JudgeRecipe, Path(path), [])))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _identity(recipe: JudgeRecipe) -> str:
    """Return the judge's name, and a hash of what its verdicts depend on in the recipe and the prompt's file."""
    verdict = {name: getattr(recipe, name) for name in ("orders", "ties", "half_tie", "seed")}
    # Only what is not at its default, as a later version may have more settings.
    names = {"kind", "model", *recipe.judge.changed()} - set(OF_NO_VERDICT)
    verdict |= {"name": recipe.judge.name} | {name: getattr(recipe.judge, name) for name in names}
    if recipe.prompt is not None:
        verdict["prompt"] = asdict(load_prompt(recipe.prompt))
    digest = hashlib.sha256(json.dumps(verdict, sort_keys=True).encode()).hexdigest()
    return f"the judge {recipe.judge.name} with the settings {digest[:16]}"


def _ask(recipe: JudgeRecipe, questions: Sequence[Question]) -> Outcome:
    """Answer the questions, from the store where it has the answers; what it has to say is in the store too."""
    # In a thread, for there signals stay the training's, which saves its state first.
    with ThreadPoolExecutor(1) as thread:
        ask = KINDS[recipe.judge.kind].ask
        return thread.submit(ask, recipe, questions, lambda note: None).result()


@names_keys
def _checked(recipe: JudgeRecipe) -> JudgeRecipe:
    names = ("completions", "system", "baseline", "num_prompts")
    rule = "has no place here: each rollout is judged against the reference of its prompt; drop it"
    refuse_changed(recipe, names, rule)
    rule = "cannot be reward_model, which would be loaded in every step: make it a part of its own, with path"
    refuse(recipe.judge.kind == "reward_model", "judge.kind", rule)
    rule = "asks nothing, so there would be no reward; drop it"
    refuse(recipe.budget.dry_run, "budget.dry_run", rule)
    return recipe


@names_keys
def _share_of_process(recipe: JudgeRecipe) -> JudgeRecipe:
    """Give this process a store of its own and its share of the budget; a store has one user at a time."""
    num_processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if num_processes == 1:
        return recipe
    budget = recipe.budget
    too_few = budget.max_calls is not None and budget.max_calls < num_processes
    rule = f"({budget.max_calls}) is less than one call for each of {num_processes} processes"
    refuse(too_few, "budget.max_calls", rule)
    caps = {
        "max_usd": None if budget.max_usd is None else budget.max_usd / num_processes,
        "max_calls": None if budget.max_calls is None else budget.max_calls // num_processes,
    }
    run_dir = str(Path(recipe.run_dir) / f"rank_{rank}")
    store = None if recipe.store is None else f"{recipe.store}.rank_{rank}"
    return replaced(recipe, run_dir=run_dir, store=store, budget=replaced(budget, **caps))


def _against_reference(row: int, completion: Completion) -> Matchup:
    """Match a rollout, as system a, with the reference; the row number tells rollouts of one prompt apart."""
    record = completion.record
    if record.completion is None:
        raise DataError(f"{record.origin} has no reference for the judge to compare the rollout with")
    prompt = record.shared_prompt
    return Matchup(
        prompt_id_of(prompt),
        prompt,
        "policy",
        record.without_opening(completion.response),
        "reference",
        record.without_opening(record.completion),
        row,
        completion.ended,
        True,
        reference=record.completion,
        messages=None if record.chat is None else record.chat.messages,
    )
