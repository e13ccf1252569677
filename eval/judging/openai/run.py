"""Run a judge behind an OpenAI-compatible API: stored answers first, then the model, within the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from drpo.config import key, refuse
from eval.judging.collect import collect_verdicts
from eval.judging.judge import JudgeKind, JudgeStopped, Outcome
from eval.judging.judgments import disk_trouble_explained
from eval.judging.matchup import Question
from eval.judging.openai.batch_api import BatchAPIConfig, BatchJudge
from eval.judging.openai.budget import Budget
from eval.judging.openai.estimate import DryRun, estimate
from eval.judging.openai.openai_judge import OpenAIJudge, make_client
from eval.judging.openai.pairwise import load_prompt
from eval.judging.openai.preflight import check_model, known_form, probe_form
from eval.judging.openai.prices import load_price
from eval.judging.openai.rate_limit import RateLimiter
from eval.judging.openai.request import JudgeSetup, stored_verdicts
from eval.judging.openai.settings import OpenAISettings
from eval.judging.openai.store import Store
from eval.progress import Say

if TYPE_CHECKING:
    from eval.judging.judge_systems import JudgeRecipe


def ask_openai(recipe: JudgeRecipe, questions: Sequence[Question], say: Say) -> Outcome:
    """Answer the questions from the store, and ask the model for the rest.

    Raises ConfigError when the recipe lacks the model, its prompt or a price that it needs, and DryRun, with the
    estimate, for budget.dry_run.
    """
    config = recipe.judge
    rule = "must name the model that judges; there is no default, models are retired"
    refuse(config.model is None, "judge.model", rule)
    refuse(recipe.prompt is None, "prompt", "must say what the judge is asked, such as prompt=tldr-1")
    price = load_price(recipe.budget.prices_path, config.model, config.backend == "batch")
    rule = (
        f"needs a price of {config.model}, which {recipe.budget.prices_path} does not have; give a table with "
        "budget.prices, or cap budget.max_calls"
    )
    refuse(price is None and recipe.budget.max_usd is not None, "budget.max_usd", rule)
    form = "json" if config.form == "auto" else config.form
    setup = JudgeSetup(config, load_prompt(recipe.prompt), recipe.ties, form, price)
    with disk_trouble_explained(Path(recipe.run_dir)), closing(Store(recipe.store_path)) as store:
        ledger = store.ledger()
        if ledger.num_open:
            say(
                f"{ledger.num_open} requests had no end when an earlier run was killed: they may have been paid, and "
                f"count against the budget with ${ledger.open_usd:.4f}"
            )
        setup = replace(setup, form=known_form(setup, store) or form)
        if recipe.budget.dry_run:
            estimated = estimate(setup, questions, store)
            say(estimated.text())
            raise DryRun(estimated)
        outcome = Outcome(stored_verdicts(setup, questions, store))
        if len(outcome.verdicts) < len(questions) or store.open_batches():
            outcome = asyncio.run(_ask(recipe, setup, store, questions, say))
        else:  # neither a key nor a network is needed, nor that the model is still there
            say(estimate(setup, questions, store).text())
        return replace(outcome, calls=store.calls(), ledger=store.ledger())


async def _ask(
    recipe: JudgeRecipe, setup: JudgeSetup, store: Store, questions: Sequence[Question], say: Say
) -> Outcome:
    async with make_client(recipe.judge, recipe.retry) as client:
        budget = Budget(store, recipe.budget)
        limiter = RateLimiter(recipe.limits.requests_per_minute)

        def live(setup: JudgeSetup) -> OpenAIJudge:
            concurrency = recipe.limits.concurrency
            return OpenAIJudge(client, setup, store, budget, limiter, recipe.retry, concurrency)

        try:
            await check_model(client, recipe.judge, say)
            if recipe.judge.probe:
                setup = replace(setup, form=await probe_form(live, setup, store, say))
        except JudgeStopped as stopped:
            return Outcome(stored_verdicts(setup, questions, store), stopped)
        say(estimate(setup, questions, store).text())
        if recipe.judge.backend == "live":
            return await collect_verdicts(live(setup), questions, say)
        judge = BatchJudge(client, setup, store, budget, recipe.batch, recipe.retry, say)
        return await collect_verdicts(judge, questions, say)


def _check_recipe(recipe: JudgeRecipe) -> None:
    is_unused = recipe.judge.backend != "batch" and recipe.batch != BatchAPIConfig()
    refuse(is_unused, "batch", f"does not apply to this judge; it is for {key('judge.backend')}=batch")


OPENAI = JudgeKind(
    OpenAISettings,
    ask_openai,
    named_by="model",
    recipe_keys=("prompt", "store", "budget", "limits", "retry", "batch"),
    check_recipe=_check_recipe,
)
