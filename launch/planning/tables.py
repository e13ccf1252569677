"""The tables of plans: one run's memory by part and phase, its configs side by side, and rows of many recipes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from launch.planning.gpus import GIB
from launch.planning.launchers import Launcher
from launch.planning.plan import Plan

PARTS = ("gradients", "optimizer", "gathered weights", "communication", "key-value cache", "activations")
"What a phase holds beside the models, in the order of its rows."
WIDTH = 120
"Columns at least: the verdict is longer than the 80 of a pipe."


def print_plans(title: str, shown: Plan, plans: Sequence[Plan], suggestions: Sequence[str]) -> None:
    """Print the plan `shown` by part and phase, whether it fits, all plans in short, notes and suggestions."""
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(_parts_table(title, shown))
    verdict = "fits" if shown.fits else "does NOT fit"
    console.print(
        f"{verdict}: {_gib(shown.peak)} GiB ({shown.peak_phase}) of {_gib(shown.gpus.usable)} usable; host: "
        + ", ".join(f"{part} {_gib(size)}" for part, size in shown.host.items()),
        highlight=False,
    )
    comparison = Table(title="accelerate configs", title_justify="left")
    for column in ("config", "GiB on one GPU", "phase", "fits"):
        comparison.add_column(column)
    for plan in plans:
        comparison.add_row(plan.launcher.name, _gib(plan.peak), plan.peak_phase, "yes" if plan.fits else "no")
    console.print(comparison)
    for line in (*shown.step.notes, *(f"to change: {suggestion}" for suggestion in suggestions)):
        console.print(line, highlight=False)


def markdown_head(launchers: Sequence[Launcher]) -> str:
    """Return the first two lines of a Markdown table with a column for each launcher."""
    names = " | ".join(launcher.name for launcher in launchers)
    return f"| recipe | {names} |\n| --- |{' --- |' * len(launchers)}"


def markdown_row(name: str, plans: Sequence[Plan | None]) -> str:
    """Return a recipe's row: the peak under each launcher, bold where it fits, - for one that it cannot run under."""
    return f"| `{name}` | {' | '.join(map(_cell, plans))} |"


def _cell(plan: Plan | None) -> str:
    if plan is None:
        return "-"
    return f"**{_gib(plan.peak)}**" if plan.fits else _gib(plan.peak)


def _parts_table(title: str, plan: Plan) -> Table:
    launcher, gpus, phases = plan.launcher, plan.gpus, list(plan.phases)
    table = Table(
        title=f"{title}: GiB on one of {gpus.count} {gpus.name}, {launcher.name}", title_justify="left"
    )
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    found = {part for phase in phases for part in plan.phases[phase]}
    parts = [*plan.step.weights, *(part for part in PARTS if part in found)]
    for part in parts:
        table.add_row(part, *(_gib(plan.phases[phase].get(part)) for phase in phases))
    logits = {phase.name: phase.logits for phase in plan.step.phases if phase.logits}
    if logits:
        table.add_row("  a chunk of logits in them", *(_gib(logits.get(phase)) for phase in phases))
    table.add_section()
    table.add_row("all", *(_gib(plan.total(phase)) for phase in phases))
    return table


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.1f}"
