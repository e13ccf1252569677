"""Size a training run before it: memory by part and phase, and the accelerate configs that it fits.

python launch/plan.py [COMMAND] RECIPE [key=value ...] --gpus 8xH100 [--accelerate NAME] [--json]
python launch/plan.py COMMAND 'PATTERN' --gpus 8xH100 --table     a Markdown row for each shipped recipe
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from drpo.config import ConfigError, load_recipe
from launch.cli import accelerate_config
from launch.command_line import RECIPES, USER_ERRORS, find_recipe, quieten_libraries, split_arguments
from launch.planning.gpus import CAPACITY, Gpus, parse_gpus
from launch.planning.launchers import read_launcher
from launch.planning.plan import Planner, advice, can_run
from launch.planning.stages import STAGES
from launch.planning.tables import markdown_head, markdown_row, print_plans

COMPARED = ("single_gpu", "multi_gpu", "zero2", "zero3", "zero3_offload")


def main() -> None:
    """Read the command line, plan, print."""
    options, rest = _parser().parse_known_args()
    quieten_libraries()
    warnings.filterwarnings("ignore")  # torch's of tensors without numbers
    try:
        _plan(options, rest)
    except USER_ERRORS as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drpo plan",
        usage="drpo plan [COMMAND] RECIPE [key=value ...] --gpus 8xH100 [--accelerate NAME] [--json]",
        description="Size a training run: what weights, gradients, optimizer, frozen models, cache and activations "
        "take on each GPU and on the host, whether that fits, and under which accelerate config.",
        epilog=f"COMMAND is one of {', '.join(STAGES)}; it may be left out where the recipe's keys tell it.",
    )
    parser.add_argument(
        "--gpus", required=True, help=f"GPUs of one machine: 8xH100, or 8x80 (GB); {', '.join(CAPACITY)}"
    )
    parser.add_argument(
        "--accelerate", help="config by name or path; without it the shipped ones are compared"
    )
    parser.add_argument(
        "--table", action="store_true", help="print a Markdown row for each recipe that matches RECIPE"
    )
    parser.add_argument("--json", action="store_true", help="print the plans as JSON")
    return parser


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> None:
    command, rest = (rest[0], rest[1:]) if rest and rest[0] in STAGES else (None, rest)
    path, overrides = split_arguments(rest)
    if path is None:
        raise ConfigError("a plan needs a recipe: drpo plan drpo tldr/drpo_2.8b.yaml --gpus 8xH100")
    gpus = parse_gpus(options.gpus)
    if options.table:
        _print_rows(command, path, overrides, gpus)
        return
    command, recipe = _loaded(command, find_recipe(path), overrides)
    names = _compared(gpus)
    if options.accelerate is not None:
        names = [options.accelerate, *(name for name in names if name != options.accelerate)]
    launchers = [read_launcher(accelerate_config(name), gpus.count) for name in names]
    asked = int(options.accelerate is not None)
    launchers = launchers[:asked] + [each for each in launchers[asked:] if can_run(recipe, each)]
    planner = Planner(recipe, gpus)
    plans = [planner.plan(launcher) for launcher in launchers]
    shown = (
        plans[0]
        if options.accelerate
        else next((plan for plan in plans if plan.fits), min(plans, key=lambda p: p.peak))
    )
    suggestions = [] if shown.fits else advice(shown, recipe)
    if options.json:
        result = {"command": command, "recipe": path, "gpus": options.gpus, "advice": suggestions}
        print(json.dumps(result | {"plans": [plan.as_json() for plan in plans]}, indent=1))
        return
    print_plans(f"drpo {command} {path}", shown, plans, suggestions)


def _print_rows(command: str | None, pattern: str, overrides: Sequence[str], gpus: Gpus) -> None:
    """Print a row of peaks by config for each shipped recipe that matches the pattern; bold where it fits."""
    names = sorted(str(each.relative_to(RECIPES)) for each in RECIPES.rglob("*.yaml"))
    names = [name for name in names if fnmatch(name, pattern)]
    if not names:
        raise ConfigError(f"no recipe under launch/recipes matches {pattern!r}")
    launchers = [read_launcher(accelerate_config(name), gpus.count) for name in _compared(gpus)]
    print(markdown_head(launchers))
    for name in names:
        _, recipe = _loaded(command, RECIPES / name, overrides)
        planner = Planner(recipe, gpus)
        plans = [planner.plan(each) if can_run(recipe, each) else None for each in launchers]
        print(markdown_row(name, plans), flush=True)


def _compared(gpus: Gpus) -> list[str]:
    return list(COMPARED) if gpus.count > 1 else ["single_gpu"]


def _loaded(command: str | None, path: Path, overrides: Sequence[str]) -> tuple[str, Any]:
    """Load the recipe of the command; without one, of the only command that can read it."""
    if command is not None:
        stage = STAGES[command]
        return command, load_recipe(stage.recipe, path, [*overrides, *stage.forced])
    readers: dict[type, tuple[str, Any]] = {}
    for name, stage in STAGES.items():
        with contextlib.suppress(ConfigError):
            readers.setdefault(stage.recipe, (name, load_recipe(stage.recipe, path, overrides)))
    if len(readers) != 1:
        state = (
            f"{' and '.join(name for name, _ in readers.values())} could read"
            if readers
            else "no command can read"
        )
        raise ConfigError(f"{state} {path}: name the command first, one of {', '.join(STAGES)}")
    return next(iter(readers.values()))


if __name__ == "__main__":
    main()
