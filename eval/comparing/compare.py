"""Compare several systems on the same held-out prompts: win rates, KL and rewards, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from drpo.config import ConfigError, replaced, save_resolved
from drpo.engine import Engine, EngineConfig
from drpo.reward_functions import import_functions
from drpo.rewards import RewardFn
from drpo.run.stopped import RunStopped
from drpo.versions import git_commit, package_versions
from eval.comparing.console_table import comparison_table
from eval.comparing.recipe import REWARD_MODEL, CompareRecipe, slug
from eval.comparing.result import compare_systems
from eval.comparing.runs import (
    COMPLETIONS,
    asked_prompts,
    check_runs_differ,
    check_systems,
    judge_run,
    run_of_file,
    run_of_policy,
    run_of_references,
)
from eval.comparing.systems import KL, Run, System, measures_of
from eval.completions.rows import REFERENCE
from eval.judging.judges import KINDS
from eval.judging.judgments import tokens_and_cost
from eval.judging.matchup import pair_up
from eval.judging.openai.estimate import DryRun, Estimate, total_text
from eval.judging.openai.store import Store
from eval.judging.verdict import Judgment
from eval.progress import Say
from eval.reporting.comparison import Comparison, Description, JudgeRow, write_comparison
from eval.reporting.report import write_report
from reward_models.score import RewardModelScorer

TABLE_WIDTH = 180


def compare(recipe: CompareRecipe, say: Say = print) -> Path:
    """Sample, measure and judge every system, and write the comparison with its report.

    Writes comparison.json, report.html, report.md, config.yaml, the completions and the judgments to `run_dir`, and
    returns the path of report.html. A second call computes, and pays for, only what is missing. Raises ConfigError or
    DataError for inputs that cannot be read, RunStopped when the judge stops.
    """
    if not recipe.systems:
        raise ConfigError(
            "systems must name what is compared, such as {name: PPO, policies: [runs/ppo/policy]}"
        )
    check_systems(recipe.systems, recipe.kl_reference)
    prompts = asked_prompts(recipe.complete, recipe.systems, recipe.baseline, recipe.pairs != "none")
    folder = Path(recipe.run_dir)
    config = EngineConfig(mixed_precision=recipe.complete.mixed_precision, trackers=[])
    engine = Engine(config, folder, recipe.complete.seed, max_grad_norm=None)
    # Null resolved for this machine.
    recipe = replace(recipe, complete=replace(recipe.complete, mixed_precision=engine.precision))
    systems = _measured_systems(recipe, engine, prompts, say)
    is_main = engine.is_main
    engine.close()  # judging takes long, and only the main process calls the judge
    if not is_main:
        return folder
    save_resolved(recipe, folder / "config.yaml")
    between: list[Judgment] = []
    if recipe.pairs != "none":
        systems, between = _judged_systems(recipe, systems, say)
    has_kl = any(system.values(KL) for system in systems)
    rewards = [REWARD_MODEL] * (recipe.reward_model is not None) + list(recipe.reward_functions)
    measures = measures_of(recipe.baseline, recipe.pairs != "none", has_kl, rewards)
    findings = compare_systems(
        systems, measures, recipe.baseline, recipe.setting_name, between, recipe.num_examples
    )
    comparison = Comparison(**vars(_description(recipe)), **vars(findings))
    write_comparison(comparison, folder)
    report = write_report(comparison, folder)
    Console(width=TABLE_WIDTH).print(comparison_table(comparison))
    return report


# --- the systems ----------------------------------------------------------------------------------------


def _measured_systems(
    recipe: CompareRecipe, engine: Engine, prompts: Mapping[str, Mapping[str, Any]] | None, say: Say
) -> list[System]:
    """Sample and measure every run of every system; all processes must call it."""
    rewards: dict[str, RewardFn] = {}
    if recipe.reward_model is not None:
        batch_size, dtype = recipe.complete.batch_size, recipe.complete.dtype
        rewards[REWARD_MODEL] = RewardModelScorer.load(
            recipe.reward_model, engine, batch_size, dtype, None, "reward_model"
        )
    rewards |= import_functions(recipe.reward_functions, "reward_functions")
    systems = []
    for config in recipe.systems:
        runs = []
        for index, path in enumerate(config.completions):
            folder = recipe.folder_of(config.name, index)
            runs.append(run_of_file(path, config.name, folder, engine, rewards, prompts, say))
        for index, policy in enumerate(config.policies):
            folder = str(recipe.folder_of(config.name, index))
            complete = replaced(recipe.complete, policy=policy, system=config.name, run_dir=folder)
            kl_reference = config.kl_references[index] if config.kl_references else recipe.kl_reference
            runs.append(run_of_policy(complete, engine, kl_reference, rewards, say))
        check_runs_differ(config.name, runs)
        systems.append(System(config.name, config.method or config.name, config.setting, tuple(runs)))
    if recipe.baseline == REFERENCE:
        policy = next((policy for system in recipe.systems for policy in system.policies), None)
        runs, folder = [run for system in systems for run in system.runs], recipe.folder_of(REFERENCE, 0)
        references = run_of_references(runs, policy, folder, engine, rewards)
        systems.append(System(REFERENCE, REFERENCE, None, (references,)))
    return systems


def _judged_systems(
    recipe: CompareRecipe, systems: Sequence[System], say: Say
) -> tuple[list[System], list[Judgment]]:
    """Return the systems with the verdicts on each run, and the judgments between systems."""
    (baseline,) = (system for system in systems if system.name == recipe.baseline)
    rivals = [system for system in systems if system is not baseline]
    meetings = [(one, baseline, index) for one in rivals for index in range(len(one.runs))]
    if recipe.pairs == "all":
        for one, other in combinations(rivals, 2):
            meetings += [(one, other, index) for index in range(max(len(one.runs), len(other.runs)))]
    for one, other, index in meetings:  # check all before paying for any
        rows = [*one.runs[index % len(one.runs)].rows, *other.runs[index % len(other.runs)].rows]
        pair_up(rows, one.name, other.name)
    judged: dict[str, list[Run]] = {}
    between: list[Judgment] = []
    estimates: list[Estimate] = []
    for number, (one, other, index) in enumerate(meetings, 1):
        say(f"judging {number} of {len(meetings)}: {one.name} against {other.name}, run {index}")
        try:
            run = _judge(recipe, one, other, index, say)
        except DryRun as stopped:
            estimates.append(stopped.estimate)
            continue
        if other is baseline:
            judged.setdefault(one.name, []).append(run)
        else:
            between += run.judgments
    if estimates:
        raise RunStopped(f"judging.budget.dry_run: nothing was asked. In all {total_text(estimates)}")
    return [replace(system, runs=tuple(judged.get(system.name, system.runs))) for system in systems], between


def _judge(recipe: CompareRecipe, one: System, other: System, index: int, say: Say) -> Run:
    """Judge run `index` of `one` against that of `other`, modulo their numbers of runs. Raises DryRun."""
    run, rival = index % len(one.runs), index % len(other.runs)
    files = [recipe.folder_of(one.name, run) / COMPLETIONS, recipe.folder_of(other.name, rival) / COMPLETIONS]
    folder = Path(recipe.run_dir) / "judgments" / f"{slug(one.name)}_{run}" / f"{slug(other.name)}_{rival}"
    judging = replace(
        recipe.judging,
        run_dir=str(folder),
        completions=[str(file) for file in files],
        system=one.name,
        baseline=other.name,
        store=str(recipe.store) if _keeps_store(recipe) else None,
    )
    return judge_run(judging, one.runs[run], say)


def _keeps_store(recipe: CompareRecipe) -> bool:
    """Return whether the judge's answers are stored, because they are paid for."""
    return "store" in KINDS[recipe.judging.judge.kind].recipe_keys


# --- the result -----------------------------------------------------------------------------------------


def _description(recipe: CompareRecipe) -> Description:
    """Describe the run: its title, the judge, the versions."""
    task = recipe.complete.data.task
    names = ", ".join(system.name for system in recipe.systems)
    return Description(
        title=recipe.title or f"{task}: {names} against {recipe.baseline}",
        task=task,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=git_commit(),
        versions=package_versions(),
        judge=_judge_row(recipe) if recipe.pairs != "none" else None,
    )


def _judge_row(recipe: CompareRecipe) -> JudgeRow:
    judging, spent = recipe.judging, None
    if _keeps_store(recipe):
        with closing(Store(recipe.store)) as store:
            spent = tokens_and_cost(store.calls())
    judge = judging.judge
    return JudgeRow(judge.kind, judge.name, judging.prompt, judging.orders, judging.ties, spent)
