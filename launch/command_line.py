"""Command line of the launch scripts: `script.py [recipe.yaml] [section.key=value ...]`, --help, short errors."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging as transformers_logging

from drpo.config import ConfigError, load_recipe
from drpo.config_help import help_text
from drpo.data.records import DataError
from drpo.run.checkpoints import CheckpointError
from drpo.run.signals import graceful_shutdown
from drpo.run.stopped import RunStopped
from launch.demo_inputs import LAUNCH, make_demo_inputs

Recipe = TypeVar("Recipe")


class StageFailed(Exception):
    """Failure of a script that another script ran; the message names its log."""


RECIPES = LAUNCH / "recipes"
USER_ERRORS = (ConfigError, DataError, CheckpointError, RunStopped, FloatingPointError, OSError, StageFailed)
"Errors in recipe, data, checkpoint, disk or training that a user can fix."


def main(
    recipe_class: type[Recipe],
    default_recipe: str,
    run: Callable[[Recipe], Path],
    inputs: Callable[[Recipe], Sequence[str | None]] = lambda recipe: (),
    forced: Sequence[str] = (),
    one_process: bool = False,
) -> None:
    """Read the command line, run the recipe, print the path of the result as the last line.

    USER_ERRORS are printed as one message without a traceback, exit code 1; Ctrl-C exits with 130.

    Args:
        recipe_class: the recipe's section.
        default_recipe: name of the recipe that is used without one.
        run: takes the recipe and returns the path.
        inputs: the recipe's inputs; those of the demo are made where they are missing.
        forced: overrides that come last.
        one_process: whether to raise ConfigError under a launcher with several processes.
    """
    arguments = sys.argv[1:]
    script = Path(sys.argv[0]).name
    if {"-h", "--help"} & set(arguments):
        usage = f"usage: {script} [recipe.yaml] [section.key=value ...]   (no recipe: {default_recipe})"
        print(help_text(recipe_class, usage))
        return
    quieten_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe gets each message at once
    try:
        path, overrides = split_arguments(arguments)
        recipe = load_recipe(recipe_class, find_recipe(path or default_recipe), [*overrides, *forced])
        if one_process and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("this runs in one process: start it with python")
        with graceful_shutdown():
            make_demo_inputs(*inputs(recipe))
            result = run(recipe)
    except USER_ERRORS as error:
        raise SystemExit(f"{script}: {error}") from None
    except KeyboardInterrupt:
        print(f"{script}: stopped; what is on disk is kept", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(result.resolve())


def call(
    num_threads: int,
    command: list[str],
    log: Path,
    folder: Path | None = None,
    python: str | Path = sys.executable,
) -> None:
    """Run a script in a fresh process; raise StageFailed, naming the log, when it fails.

    Args:
        num_threads: OMP_NUM_THREADS of the process.
        command: the script and its arguments.
        log: what it prints.
        folder: where it runs; None: here.
        python: the interpreter.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with log.open("w") as file:
        process = [str(python), *command]
        code = subprocess.run(process, stdout=file, stderr=file, env=environment, cwd=folder).returncode
    if code:
        raise StageFailed(f"{' '.join(command)} failed with code {code}; see {log}")


def run_stage(stage: str, *arguments: str) -> None:
    """Run launch/<stage>.py as a user would; exit with a message when it fails."""
    print(f"\n=== {stage}: launch/{stage}.py {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, str(LAUNCH / f"{stage}.py"), *arguments]).returncode:
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script}: the stage {stage} failed; the same command again goes on from there")


def quieten_libraries() -> None:
    """Silence the progress bars of transformers, and warnings of DeepSpeed, accelerate and FSDP."""
    transformers_logging.disable_progress_bar()
    # It warns of writing into outputs, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    noise = {
        "DeepSpeed": "Setting accelerator to CPU",
        "accelerate.utils.other": "Removed shared tensor",  # tied weights, and the shared trunk
    }
    for logger, text in noise.items():
        logging.getLogger(logger).addFilter(lambda record, text=text: text not in record.getMessage())


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split arguments into the recipe (the one without `=`, at most one) and the overrides."""
    overrides = [argument for argument in arguments if "=" in argument]
    paths = [argument for argument in arguments if "=" not in argument]
    if len(paths) > 1:
        raise ConfigError(f"one recipe at most, got {paths}; overrides are written section.key=value")
    if paths and paths[0].startswith("-"):
        raise ConfigError(f"unknown flag {paths[0]}; settings are written section.key=value, see --help")
    return (paths[0] if paths else None), overrides


def find_recipe(path: str) -> Path:
    """Find a recipe by its path, or by its name under launch/recipes (`tldr/drpo_1b.yaml`)."""
    if Path(path).exists():
        return Path(path)
    if (RECIPES / path).exists():
        return RECIPES / path
    names = sorted(str(recipe.relative_to(RECIPES)) for recipe in RECIPES.rglob("*.yaml"))
    raise ConfigError(f"no recipe {path} here or in launch/recipes, which has: {', '.join(names)}")
