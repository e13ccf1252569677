"""Ask a judge which of two systems responds better: a model behind an API, a reward model or a function."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from drpo.config import ConfigError, Section, key, refuse_changed, save_resolved, setting
from drpo.jsonl import write_whole
from drpo.run.stopped import RunStopped
from eval.completions.rows import load_completions
from eval.judging.attacks import with_controls
from eval.judging.judge import Outcome
from eval.judging.judged_statistics import JudgedStatistics, judged_statistics, statistics_text
from eval.judging.judges import KINDS, JudgeConfig
from eval.judging.judgments import (
    disk_trouble_explained,
    reasons,
    reasons_text,
    spent_text,
    tokens_and_cost,
    tool_versions,
    write_judgments,
)
from eval.judging.matchup import Question, first_prompts, pair_up, questions_of
from eval.judging.openai.batch_api import BatchAPIConfig
from eval.judging.openai.budget import BudgetConfig
from eval.judging.openai.rate_limit import LimitsConfig
from eval.judging.openai.retry import RetryConfig
from eval.judging.verdict import combine_all
from eval.progress import Say


@dataclass(frozen=True)
class JudgeRecipe(Section):
    """One system against a baseline, judged on the prompts that both answered."""

    run_dir: str = "runs/judge"
    """Folder of the results."""
    completions: list[str] = field(default_factory=list)
    """Files of completions: completions.jsonl, or .json in alpaca_eval's shape."""
    system: str | None = None
    """The system to judge. Besides those of the files: reference (the dataset's responses), "null" (a constant)
    and attack/<name> (eval/judging/attacks.py)."""
    baseline: str = "reference"
    """The system that it is compared with."""
    num_prompts: int | None = setting(None, ge=1)
    """Judge on so many of the prompts, chosen by their hashes; null for all."""
    prompt: str | None = None
    """judge.kind=openai: what is asked, tldr-1, hh_helpful-1, hh_harmless-1, or a .yaml file with one's own prompt."""
    orders: Literal["both", "one"] = "both"
    """Show each matchup in both orders, or in one that is drawn by the seed: half the cost, but what the slot
    decides then counts as the response's merit."""
    ties: bool = True
    """Whether the judge may call a tie."""
    half_tie: Literal["half", "tie"] = "half"
    """What a win in one order and a tie in the other count: 0.75 (half), or 0.5 (tie)."""
    max_undecided: float = setting(0.05, ge=0, le=1)
    """The run ends with an error, everything written, when a larger share of the matchups is undecided."""
    max_failed: float = setting(0.0, ge=0, le=1)
    """The same for verdicts that failed; the same command again asks for them again."""
    seed: int = 0
    """Draws the orders for orders=one."""
    store: str | None = None
    """judge.kind=openai: file of the store, which several runs may share; null: verdicts.sqlite in run_dir."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    batch: BatchAPIConfig = field(default_factory=BatchAPIConfig)

    def check(self) -> None:
        orders = f"does not apply to {key('orders')}={self.orders}"
        refuse_changed(self, ["seed" if self.orders == "both" else "half_tie"], orders)
        kind = KINDS[self.judge.kind]
        foreign_keys = {name for k in KINDS.values() for name in k.recipe_keys} - set(kind.recipe_keys)
        rule = f"does not apply to {key('judge.kind')}={self.judge.kind}"
        refuse_changed(self, [field.name for field in fields(self) if field.name in foreign_keys], rule)
        kind.check_recipe(self)

    @property
    def store_path(self) -> Path:
        return Path(self.store) if self.store else Path(self.run_dir) / "verdicts.sqlite"


def judge(recipe: JudgeRecipe, say: Say = print) -> Path:
    """Pair the responses, ask the judge, write its verdicts, and return the path of judgments.jsonl.

    Writes judgments.jsonl, summary.json, config.yaml and, for a model behind an API, the store to `run_dir`. A second
    call asks only unanswered questions. Raises ConfigError or DataError for inputs that cannot be read, RunStopped for
    an incomplete run.
    """
    if not recipe.completions or recipe.system is None:
        raise ConfigError(
            "completions must name files with completions, and system one of their systems (bare null means none: the "
            "constant one is written 'system=\"null\"')"
        )
    rows = with_controls(load_completions(recipe.completions), recipe.system, recipe.baseline)
    matchups = pair_up(rows, recipe.system, recipe.baseline)
    if recipe.num_prompts is not None:
        total = len({matchup.prompt_id for matchup in matchups})
        if total < recipe.num_prompts:
            say(f"num_prompts={recipe.num_prompts}, but the files have {total} prompts: all are judged")
        matchups = first_prompts(matchups, recipe.num_prompts)
    questions = questions_of(matchups, recipe.orders, recipe.seed)
    folder = Path(recipe.run_dir)
    with disk_trouble_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_resolved(recipe, folder / "config.yaml")
    outcome = KINDS[recipe.judge.kind].ask(recipe, questions, say)
    with disk_trouble_explained(folder):
        return _write(recipe, questions, outcome, say)


def _write(recipe: JudgeRecipe, questions: Sequence[Question], outcome: Outcome, say: Say) -> Path:
    """Write judgments.jsonl and summary.json, also of a stopped run. Raises RunStopped for an incomplete one."""
    folder = Path(recipe.run_dir)
    place = {(q.matchup.prompt_id, q.matchup.seed, q.order): i for i, q in enumerate(questions)}
    verdicts = sorted(outcome.verdicts, key=lambda v: place[v.prompt_id, v.seed, v.order])
    common = {
        "judge": recipe.judge.name,
        "prompt_name": recipe.prompt,
        "orders": recipe.orders,
        "versions": tool_versions(),
    }
    write_judgments(folder / "judgments.jsonl", verdicts, outcome.calls, common)
    statistics = judged_statistics(combine_all(verdicts, recipe.half_tie, recipe.orders))
    summary = {
        "system": recipe.system,
        "baseline": recipe.baseline,
        **common,
        "asked": len(questions),
        **asdict(statistics),
        "reasons": reasons(verdicts),
    }
    say(statistics_text(statistics, recipe.system, recipe.baseline))
    if summary["reasons"]:
        say(reasons_text(summary["reasons"]))
    if outcome.ledger is not None:
        used = {key for verdict in verdicts for key in verdict.keys}
        summary["spent"] = tokens_and_cost([call for call in outcome.calls if call.key in used])
        summary["store"] = asdict(outcome.ledger)
        say(spent_text(summary["spent"], outcome.ledger))
    write_whole(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    if outcome.stopped is not None:
        raise RunStopped(
            f"{outcome.stopped}. {len(verdicts)} of {len(questions)} verdicts are in {folder}/judgments.jsonl; the "
            "command goes on from there"
        )
    _refuse_if_incomplete(recipe, statistics, len(questions))
    return folder / "judgments.jsonl"


def _refuse_if_incomplete(recipe: JudgeRecipe, statistics: JudgedStatistics, num_questions: int) -> None:
    failed, undecided = statistics.statuses["failed"], statistics.undecided
    if failed > recipe.max_failed * num_questions:
        raise RunStopped(
            f"{failed} of {num_questions} questions got no answer, more than max_failed={recipe.max_failed:g} allows; "
            "the same command again asks only these"
        )
    if undecided > recipe.max_undecided * statistics.num_comparisons:
        raise RunStopped(
            f"{undecided} of {statistics.num_comparisons} comparisons are undecided, more than "
            f"max_undecided={recipe.max_undecided:g} allows; judgments.jsonl says why"
        )
