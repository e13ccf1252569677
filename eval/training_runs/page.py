"""What the pages of a training run hold, and the Markdown one: functions of the files of its folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drpo.run.folder import flatten
from drpo.trainers.credit import method_name
from drpo.trainers.online_recipe import OnlineRecipe
from eval.reporting.report_markdown import escaped, markdown_list, markdown_table
from eval.reporting.report_tables import Column, Table, number_text, row_of
from eval.training_runs.files import TrainingRun
from eval.training_runs.plots import HELD_OUT, Plot, eval_plots, reset_plots, start_plots
from eval.training_runs.series import (
    NUM_BLOCKS,
    by_start,
    eval_keys,
    fraction_names,
    fraction_shares,
    has_position,
    mean,
    mean_length,
    start_groups,
    thirds,
)

PROMPT_TAIL = 400
"Characters of a prompt that a sample shows."
SAMPLES_PER_STEP = 8
MEANINGS = {
    "held-out": "completions of prompts that are not trained on, always from the bare prompt. score is the reward of "
    "training; the other rewards are those of eval.reward_functions. length: tokens, the stop token included. ended: "
    "the share that stopped by itself.",
    "kl": "mean over the held-out completions of log pi / pi_ref, summed over a completion, in nats: how far the "
    "policy has moved from the reference. log_ratio is the same sum where completions are sampled at another "
    "temperature than rollouts; it is no KL then.",
    "score by start": "mean raw reward of the training rollouts of a step that started there. Where few tokens are "
    "left to the policy, the score is mostly that of the forced text.",
    "KL by start": "the KL to the reference per rollout, summed over the sampled tokens alone: shorter continuations "
    "have less of it. The k1 estimate; of runs of earlier versions k3, in which single rollouts make spikes far from "
    "the reference.",
    "sampled length": "tokens that the policy wrote, the forced prefix not counted.",
    "curves": f"a point a step; of more than {NUM_BLOCKS} steps, means over blocks of consecutive ones.",
    "thirds": "first, middle and last third of the steps so far: means over the steps in which the group has "
    "rollouts.",
}
MEANINGS_OF_RESETS = {
    "prefix fraction": "h/L, the forced tokens h as a share of the L tokens of the response that they come from. "
    "(0.25, 0.5] means above 0.25 and up to 0.5. The bare prompt has h = 0.",
    "as drawn": "where the rollouts of every step really started, over all processes (resets.jsonl).",
}
MEANING_OF_POSITION = (
    "where prompts that were not seen before start with an adaptive length, from 0 at the shortest allowed prefix to 1 "
    "at the longest, give or take reset.adaptive.spread."
)


@dataclass(frozen=True)
class Part:
    """A section of the page; `notes` say what a run does not have."""

    name: str
    title: str
    notes: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A rollout of a step: the end of its prompt, the forced prefix and what the policy wrote."""

    step: int
    prompt: str
    prefix: str
    continuation: str
    ended: bool
    scores: str


@dataclass(frozen=True)
class Page:
    """All that both pages show."""

    title: str
    facts: list[tuple[str, str]]
    parts: list[Part]
    samples: list[Sample]
    samples_note: str
    meanings: Mapping[str, str]


def page_of(run: TrainingRun) -> Page:
    """Draw and tabulate a run."""
    samples, note = _samples(run)
    parts = [_held_out(run), _by_start(run), _as_drawn(run)]
    title = f"Training run {run.settings.get('run_dir') or ''}".strip()
    meanings = MEANINGS | (MEANINGS_OF_RESETS if run.has_resets else {})
    if has_position(run.metrics):
        meanings["position"] = MEANING_OF_POSITION
    return Page(title, facts(run), parts, samples, note, meanings)


def facts(run: TrainingRun) -> list[tuple[str, str]]:
    """Return name and text of the facts at the top: inputs, progress, settings, the last evaluation."""
    settings = run.settings
    last = max((row["step"] for row in run.metrics), default=0)
    progress = f"{last} of {settings['num_steps']}"
    found = {
        "method": method_name(settings.get("advantage.estimator", "gae"), run.has_resets),
        "data": " ".join(str(settings[key]) for key in ("data.task", "data.path") if settings.get(key)),
        "policy": settings.get("model.path"),
        "reward": _reward(settings),
        "steps": progress if last == settings["num_steps"] else f"{progress}: still going, or interrupted",
        "rollouts a step": _rollouts(settings),
        "seed": settings.get("seed"),
        "advantages": _estimator(settings),
        "KL penalty": _listed(settings, "kl.", ("coef",)),
        "resets": _resets(settings) if run.has_resets else "none",
        "last evaluation": _last_evaluation(run),
        "commit": re.sub(r"^([0-9a-f]{12})[0-9a-f]{28}", r"\1", run.versions.get("git_commit", "")),
    }
    return [(name, str(text)) for name, text in found.items() if text not in (None, "")]


def _rollouts(settings: Mapping[str, Any]) -> str:
    group_size = settings.get("rollout.rollouts_per_prompt", 1)
    return f"{settings['rollout.batch_size']}" + f", {group_size} of a prompt" * (group_size != 1)


def _estimator(settings: Mapping[str, Any]) -> str:
    of_states = _listed(settings, "vine.", ("num_rollouts", "every"))
    is_vine = settings.get("advantage.estimator") == "vine"
    return _listed(settings, "advantage.", ("estimator",)) + f", {of_states}" * is_vine


def _resets(settings: Mapping[str, Any]) -> str:
    """List the settings of resets that have an effect, those of an adaptive length whatever their values."""
    names = ["proportion", "source", "length"]
    without = []
    if settings.get("reset.length") == "adaptive":
        is_source = settings.get("reset.adaptive.target") == "source"
        names += ["adaptive.target", "adaptive.margin" if is_source else "adaptive.score", "adaptive.success"]
    else:
        without.append("reset.adaptive.")
    if settings.get("reset.source") != "own":
        without.append("reset.own.")
    used = {key: value for key, value in settings.items() if not key.startswith(tuple(without))}
    return _listed(used, "reset.", tuple(names))


def _reward(settings: Mapping[str, Any]) -> str | None:
    for source in ("path", "function", "url"):
        if settings.get(f"reward.{source}"):
            return f"{source} {settings[f'reward.{source}']}"
    if parts := settings.get("reward.parts"):
        return "sum of " + ", ".join(
            str(part.get("name", "a part")) for part in parts if isinstance(part, dict)
        )
    has_ensemble = any(key.startswith("reward.ensemble.") for key in settings)
    return "ensemble" if has_ensemble else None


def _listed(settings: Mapping[str, Any], section: str, always: tuple[str, ...]) -> str:
    """List the settings of a section: those that are always shown, and those that differ from their defaults."""
    defaults = flatten(OnlineRecipe())
    changed = [
        key.removeprefix(section)
        for key, value in settings.items()
        if key.startswith(section) and value is not None and value != defaults.get(key)
    ]
    names = dict.fromkeys([*(name for name in always if section + name in settings), *changed])
    return ", ".join(f"{name} {settings[section + name]}" for name in names)


def _last_evaluation(run: TrainingRun) -> str | None:
    evaluated = [row for row in run.metrics if any(key.startswith("eval/") for key in row)]
    if not evaluated:
        return None
    row = evaluated[-1]
    numbers = [f"{key.removeprefix('eval/')} {_number(row[key])}" for key in eval_keys([row])]
    return f"step {row['step']}: {', '.join(numbers)}"


def _number(value: float | None) -> str:
    return number_text(value, 3)


# --- sections ---------------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *notes: str) -> Table:
    heads = tuple(Column(name, numeric=index > 0) for index, name in enumerate(columns))
    return Table(title, heads, tuple(row_of(*row) for row in rows), notes)


def _held_out(run: TrainingRun) -> Part:
    keys = eval_keys(run.metrics)
    if not keys:
        why = (
            "This run has no evaluation of held-out prompts so far (eval.every sets how often there is one)."
        )
        return Part("held-out", "Held-out prompts", (why,))
    rows = [
        [str(row["step"]), *(_number(row.get(key)) for key in keys)]
        for row in run.metrics
        if any(key in row for key in keys)
    ]
    units = {key: f" ({unit})" for key, (_, _, unit) in HELD_OUT.items()}
    names = [key.removeprefix("eval/") + units.get(key, "") for key in keys]
    table = _table("Held-out prompts over training", ("step", *names), rows)
    return Part("held-out", "Held-out prompts", (), tuple(eval_plots(run)), (table,))


def _by_start(run: TrainingRun) -> Part:
    name, title = "by-start", "By prefix fraction"
    no_resets = "This run has no resets (reset.proportion is 0): every rollout starts from the bare prompt."
    notes = () if run.has_resets else (no_resets,)
    groups = start_groups(run.metrics)
    if not groups:
        return Part(name, title, (*notes, "metrics.jsonl has no numbers of rollouts so far."))
    parts = thirds(run.metrics)
    tables = []
    for metric, (_, what) in by_start(run.metrics).items():
        rows = [
            [text, *(_number(mean(rows, f"{group}/{metric}")) for rows in parts.values())]
            for group, text in groups.items()
        ]
        tables.append(_table(what[0].upper() + what[1:], ("start", *parts), rows))
    return Part(name, title, notes, tuple(start_plots(run)), tuple(tables))


def _as_drawn(run: TrainingRun) -> Part:
    name, title = "as-drawn", "Where rollouts started"
    if not run.has_resets:
        return Part(name, title, ("Every rollout started from the bare prompt: this run has no resets.",))
    if run.resets is None:
        note = (
            "The distribution was not recorded: the folder has no resets.jsonl; earlier versions wrote none."
        )
        return Part(name, title, (note,))
    if not run.resets:
        return Part(name, title, ("No step has been recorded yet.",))
    parts = thirds(run.resets)
    shares = [fraction_shares(rows) for rows in parts.values()]
    rows = [
        [text, *(number_text(share, 1, "%") for share in row)]
        for text, *row in zip(fraction_names(), *shares, strict=True)
    ]
    rows.append(["mean forced tokens", *(number_text(mean_length(rows), 2) for rows in parts.values())])
    table = _table("Share of rollouts by prefix fraction (%)", ("h/L", *parts), rows)
    return Part(name, title, (), tuple(reset_plots(run.resets)), (table,))


# --- samples ----------------------------------------------------------------------------------------------


def _samples(run: TrainingRun) -> tuple[list[Sample], str]:
    """Return rollouts of the first, the middle and the last step that has some, and what they are."""
    steps = sorted({row["step"] for row in run.samples})
    if not steps:
        return [], "This run has written no sample rollouts (log.samples_every sets how often it does)."
    shown = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))
    samples = []
    for step in shown:
        rows = [row for row in run.samples if row["step"] == step]
        samples += [_sample(row) for row in rows[:SAMPLES_PER_STEP]]
    return (
        samples,
        f"First rollouts of steps {', '.join(map(str, shown))}; samples.jsonl has those of {len(steps)} steps.",
    )


def _sample(row: Mapping[str, Any]) -> Sample:
    prompt = row["prompt"]
    scores = ", ".join(f"{name} {_number(value)}" for name, value in row["scores"].items())
    return Sample(
        step=row["step"],
        prompt=prompt if len(prompt) <= PROMPT_TAIL else f"…{prompt[-PROMPT_TAIL:]}",
        prefix=row["prefix"],
        continuation=row["continuation"],
        ended=row["ended"],
        scores=scores,
    )


# --- Markdown ---------------------------------------------------------------------------------------------


def markdown_page(page: Page) -> str:
    """Write the page; tables stand in place of the plots, and forced prefixes have a column of their own."""
    return "\n\n".join(_markdown(page)) + "\n"


def _markdown(page: Page) -> Iterator[str]:
    yield f"# {escaped(page.title)}"
    yield markdown_list(page.facts)
    for part in page.parts:
        yield f"## {escaped(part.title)}"
        yield from map(escaped, part.notes)
        for table in part.tables:
            yield f"### {escaped(table.title)}"
            yield markdown_table(table)
    yield "## Sample rollouts"
    yield escaped(page.samples_note)
    if page.samples:
        columns = ("step", "prompt", "forced prefix", "sampled by the policy", "stopped by itself", "scores")
        rows = [
            row_of(s.step, s.prompt, s.prefix, s.continuation, "yes" if s.ended else "no", s.scores)
            for s in page.samples
        ]
        heads = tuple(Column(name, numeric=False) for name in columns)
        yield markdown_table(Table("Sample rollouts", heads, tuple(rows)))
    yield "## What the numbers are"
    yield markdown_list(list(page.meanings.items()))
