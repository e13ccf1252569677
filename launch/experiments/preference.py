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

from matplotlib.figure import Figure

from drpo.config import Section, refuse, setting
from launch.command_line import main
from launch.experiments.results import markdown_table, metric, write_results
from launch.experiments.seed_grid import RunGrid, interval

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
        for folder, (table, seed) in policies.items():
            grid.launch("sft", table.sft_recipe, folder, _shared(table, seed))
        grid.wait()
        for title, seed, setting_name, method in runs:
            table = tables[title]
            policy = _sft_dir(root, table, seed) / "policy"
            overrides = [*_shared(table, seed), f"model.path={policy}", f"sample.kl_reference={policy}"]
            overrides += [*table.overrides, *table.named_settings[setting_name], *table.methods[method]]
            grid.launch("dpo", table.recipe, _run_dir(root, title, seed, setting_name, method), overrides)
    results = {title: _results(root, title, table) for title, table in tables.items()}
    text = "\n".join(markdown(title, tables[title], results[title]) for title in tables)
    path = write_results(root, results, text)
    for title, rows in results.items():
        _plot(tables[title], rows, root / f"{_slug(title)}.png")
    return path


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
    runs = [("", "SFT", [_sft_dir(root, table, seed) for seed in table.seeds])]
    for setting_name in table.named_settings:
        for method in table.methods:
            folders = [_run_dir(root, title, seed, setting_name, method) for seed in table.seeds]
            runs.append((setting_name, method, folders))
    return [
        {"setting": setting_name, "method": method}
        | {name: _at_end(folders, key) for name, key in table.named_columns.items()}
        for setting_name, method, folders in runs
    ]


def _at_end(folders: list[Path], key: str) -> list[float] | None:
    """Return a metric at the end of each run, or None where a run does not measure it."""
    runs = [metric(folder, key) for folder in folders]
    if not all(runs):
        return None
    if key.startswith("train/"):
        return [sum(values[-50:]) / len(values[-50:]) for values in runs]
    return [values[-1] for values in runs]


def markdown(title: str, table: TableConfig, rows: list[dict]) -> str:
    """Format a table: mean over seeds with the 95% t-interval, the gain in the first column paired by seed."""
    labels = ["setting", "method"] if table.settings else ["method"]
    baseline = next(iter(table.methods))
    main_column, *other_columns = table.named_columns
    lines = []
    for row in rows:
        gain = _gain(row, rows, baseline, main_column)
        values = {main_column: row[main_column], f"gain over {baseline}": gain}
        values |= {name: row[name] for name in other_columns}
        cells = {
            name: "-" if by_seed is None else "{:.3g} ± {:.2g}".format(*interval(by_seed))
            for name, by_seed in values.items()
        }
        lines.append({label: row[label] for label in labels} | cells)
    return f"### {title}\n\n{markdown_table(lines)}"


def _gain(row: dict, rows: list[dict], baseline: str, column: str) -> list[float] | None:
    """Return differences by seed from the baseline in the same setting, None for the baseline and SFT."""
    if row["method"] in ("SFT", baseline):
        return None
    base_row = next(r for r in rows if r["method"] == baseline and r["setting"] == row["setting"])
    return [value - base for value, base in zip(row[column], base_row[column], strict=True)]


def _plot(table: TableConfig, rows: list[dict], path: Path) -> None:
    """Plot the table's first column: a panel for each setting, a mean with its interval for each method."""
    name = next(iter(table.named_columns))
    num_panels = len(table.named_settings)
    figure = Figure(figsize=(2.2 + 2.6 * num_panels, 1.2 + 0.28 * (1 + len(table.methods))))
    axes = figure.subplots(1, num_panels, sharex=True, sharey=True, squeeze=False)[0]
    for axis, setting_name in zip(axes, table.named_settings, strict=True):
        shown = [row for row in rows if row[name] is not None and row["setting"] in (setting_name, "")]
        means, halves = zip(*(interval(row[name]) for row in shown), strict=True)
        axis.errorbar(means, [row["method"] for row in shown], xerr=halves, fmt="o", capsize=3)
        axis.set_title(setting_name)
        axis.set_xlabel(f"{name} (95% interval)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(PreferenceExperimentRecipe, "demo/preference_experiment.yaml", run)
