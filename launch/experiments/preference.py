"""Compare the losses of offline preference training: tables of methods x settings over seeds.

    python launch/experiments/preference.py [recipe.yaml] [key=value ...]

For every seed of a table: one SFT policy, then one preference run per method and setting. Finished runs are skipped,
so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parents[1])


from drpo.config import Section, refuse, setting
from drpo.run.metrics import read_metrics
from launch.command_line import main
from launch.experiments.seed_grid import RunGrid, interval, launch_once

COLUMNS = {
    "true reward": "eval/true_reward",
    "preference accuracy": "eval/accuracy",
    "KL to SFT": "eval/kl",
    "length": "eval/length",
    "ended": "eval/ended",
}


@dataclass(frozen=True)
class TableConfig(Section):
    """One table: every method in every setting, over seeds."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; each has its own data, SFT policy and preference runs."""
    sft_recipe: str = "demo/sft.yaml"
    """Recipe of launch/sft.py for the policy that all runs start from."""
    recipe: str = "demo/dpo.yaml"
    """Recipe of launch/dpo.py that methods and settings override."""
    shared: list[str] = field(default_factory=list)
    """Overrides of the SFT run and of every preference run; {seed} is replaced by the seed."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every preference run."""
    settings: dict[str, list[str]] = field(default_factory=dict)
    """Name of a setting -> its overrides; {} for a single one without overrides."""
    methods: dict[str, list[str]] = field(default_factory=dict)
    """Name of a method -> its overrides."""
    columns: dict[str, str] = field(default_factory=dict)
    """Name of a column -> the metric that it shows: of the last evaluation, or the mean over the last 50 steps that
    have it (train/...); {} for true reward, preference accuracy, KL, length and share of ended samples."""

    def check(self) -> None:
        refuse(len(self.seeds) < 2, "seeds", f"must be two or more, for intervals, got {self.seeds}")
        refuse(not self.methods, "methods", "is empty; give at least one")

    @property
    def named_settings(self) -> dict[str, list[str]]:
        """The `settings`, or a single unnamed one."""
        return dict(self.settings) or {"": []}

    @property
    def named_columns(self) -> dict[str, str]:
        """The `columns`, or the default ones."""
        return dict(self.columns) or COLUMNS


@dataclass(frozen=True)
class PreferenceExperimentRecipe(Section):
    """Settings of an experiment: its tables and where its runs go."""

    run_dir: str = "runs/preference_experiment"
    """Folder of all runs, and of results.json and results.md."""
    tables: dict[str, TableConfig] = field(default_factory=dict)
    """Title -> table."""
    only: list[str] = field(default_factory=list)
    """Titles of the tables to make; [] for all."""
    num_jobs: int = setting(2, ge=1)
    """Runs at a time, each on its share of the cores."""

    def check(self) -> None:
        refuse(not self.tables, "tables", "is empty; give at least one")
        unknown = sorted(set(self.only) - set(self.tables))
        rule = f"has no table {', '.join(unknown)}; there are {', '.join(self.tables)}"
        refuse(bool(unknown), "only", rule)


def run(recipe: PreferenceExperimentRecipe) -> Path:
    """Run the experiment and write the tables."""
    root = Path(recipe.run_dir)
    root.mkdir(parents=True, exist_ok=True)
    tables = {title: recipe.tables[title] for title in recipe.only or recipe.tables}
    policies = {
        _sft_dir(root, table, seed): (table, seed) for table in tables.values() for seed in table.seeds
    }
    runs = [
        (title, seed, setting_name, method)
        for title, table in tables.items()
        for seed in table.seeds
        for setting_name in table.named_settings
        for method in table.methods
    ]
    with RunGrid(recipe.num_jobs, len(policies) + len(runs)) as grid:

        def make_policy(folder: Path) -> None:
            table, seed = policies[folder]
            launch_once("sft", table.sft_recipe, folder, _shared(table, seed), recipe.num_jobs)
            grid.advance()

        def train(cell: tuple[str, int, str, str]) -> None:
            title, seed, setting_name, method = cell
            table = tables[title]
            policy = _sft_dir(root, table, seed) / "policy"
            overrides = [*_shared(table, seed), f"model.path={policy}", f"sample.kl_reference={policy}"]
            overrides += [*table.overrides, *table.named_settings[setting_name], *table.methods[method]]
            launch_once("dpo", table.recipe, _run_dir(root, *cell), overrides, recipe.num_jobs)
            grid.advance()

        for folder in policies:
            grid.submit(make_policy, folder)
        grid.wait()
        for cell in runs:
            grid.submit(train, cell)
    results = {title: _results(root, title, table) for title, table in tables.items()}
    (root / "results.json").write_text(json.dumps(results, indent=1))
    text = "\n".join(markdown(title, tables[title], results[title]) for title in tables)
    (root / "results.md").write_text(text)
    print(text)
    for title, rows in results.items():
        _plot(tables[title], rows, root / f"{_slug(title)}.png")
    return root / "results.md"


def _shared(table: TableConfig, seed: int) -> list[str]:
    return [f"seed={seed}", *(override.replace("{seed}", str(seed)) for override in table.shared)]


def _sft_dir(root: Path, table: TableConfig, seed: int) -> Path:
    """Return the folder of an SFT policy; tables that share recipe and overrides share it."""
    name = hashlib.sha256(json.dumps([table.sft_recipe, table.shared]).encode()).hexdigest()[:8]
    return root / "sft" / name / str(seed)


def _run_dir(root: Path, title: str, seed: int, setting_name: str, method: str) -> Path:
    return root / _slug(title) / _slug(setting_name or "all") / _slug(method) / str(seed)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


def _results(root: Path, title: str, table: TableConfig) -> list[dict]:
    """Return a row for the SFT policy on the runs' data, and one for each setting and method, by seed."""
    rows = [{"setting": "", "method": "SFT"}]
    for name, key in table.named_columns.items():
        sft = [_last(_sft_dir(root, table, seed), key) for seed in table.seeds]
        rows[0][name] = None if None in sft else sft
    for setting_name in table.named_settings:
        for method in table.methods:
            row = {"setting": setting_name, "method": method}
            for name, key in table.named_columns.items():
                values = [
                    _last(_run_dir(root, title, seed, setting_name, method), key) for seed in table.seeds
                ]
                row[name] = None if None in values else values
            rows.append(row)
    return rows


def _last(run_dir: Path, key: str) -> float | None:
    """Return a metric at the end of a run, or None where the run does not measure it."""
    values = [row[key] for row in read_metrics(run_dir / "metrics.jsonl") if key in row]
    if key.startswith("train/"):
        values = [sum(values[-50:]) / len(values[-50:])] if values else []
    return values[-1] if values else None


def markdown(title: str, table: TableConfig, rows: list[dict]) -> str:
    """Format a table: mean over seeds with the 95% t-interval, the gain in the first column paired by seed."""
    first = ["setting"] if table.settings else []
    baseline = next(iter(table.methods))
    main_column, *others = table.named_columns
    header = [*first, "method", main_column, f"gain over {baseline}", *others]
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        values = [row[main_column], _gain(row, rows, baseline, main_column), *(row[name] for name in others)]
        cells = [row[name] for name in (*first, "method")]
        cells += ["-" if v is None else "{:.3g} ± {:.2g}".format(*interval(v)) for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _gain(row: dict, rows: list[dict], baseline: str, column: str) -> list[float] | None:
    """Return differences by seed from the baseline in the same setting, None for the baseline and SFT."""
    if row["method"] in ("SFT", baseline):
        return None
    other = next(r for r in rows if r["method"] == baseline and r["setting"] == row["setting"])
    return [mine - theirs for mine, theirs in zip(row[column], other[column], strict=True)]


def _plot(table: TableConfig, rows: list[dict], path: Path) -> None:
    """Plot the table's first column: a panel for each setting, a mean with its interval for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    name = next(iter(table.named_columns))
    height = 1.2 + 0.28 * (1 + len(table.methods))
    size = (2.2 + 2.6 * len(table.named_settings), height)
    figure, axes = pyplot.subplots(
        1, len(table.named_settings), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    for axis, setting_name in zip(axes[0], table.named_settings, strict=True):
        shown = [row for row in rows if row[name] is not None and row["setting"] in (setting_name, "")]
        means, halves = zip(*(interval(row[name]) for row in shown), strict=True)
        axis.errorbar(means, [row["method"] for row in shown], xerr=halves, fmt="o", capsize=3)
        axis.set_title(setting_name)
        axis.set_xlabel(f"{name} (95% interval)")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(PreferenceExperimentRecipe, "demo/preference_experiment.yaml", run)
