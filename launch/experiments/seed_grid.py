"""Run the jobs of an experiment over seeds once, several at a time, and compute intervals of results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from rich.progress import Progress
from scipy import stats

from drpo.config import ConfigError, refuse
from launch.command_line import LAUNCH, call, find_recipe

MADE_FROM = "made_from.json"
WITHOUT_SETTINGS_OF_RUNS = ("evaluate_reward_model",)
"Stages that have neither trackers nor samples."

Method = TypeVar("Method")


def launch_once(stage: str, recipe: str, run_dir: Path, overrides: Sequence[str], num_jobs: int) -> None:
    """Run launch/<stage>.py on its share of the cores, unless it has finished in `run_dir` on the same inputs.

    Raises StageFailed, naming the log, when the run fails, and ConfigError when the folder holds a run on other inputs:
    another command, recipe or data file, or a parent run that was repeated since.

    Args:
        stage: name of the launch script.
        recipe: recipe of that script.
        run_dir: folder of the run.
        overrides: settings on top, key=value.
        num_jobs: number of jobs that share the cores.
    """
    command = [str(LAUNCH / f"{stage}.py"), recipe, f"run_dir={run_dir}", *overrides]
    if stage not in WITHOUT_SETTINGS_OF_RUNS:
        command += ["engine.trackers=[]", "log.samples_every=0"]
    record, made_from = run_dir / MADE_FROM, _inputs(command, recipe)
    if record.exists():
        saved = json.loads(record.read_text())
        has_finished = saved.pop("finished")
        if changed := [name for name in sorted(saved | made_from) if saved.get(name) != made_from.get(name)]:
            raise ConfigError(
                f"{run_dir} holds a run from other inputs ({', '.join(changed)} changed); move it away to make it "
                "anew, or choose another run_dir"
            )
        if has_finished:
            return
    run_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**made_from, "finished": False}))
    call(max(1, (os.cpu_count() or 1) // num_jobs), command, run_dir / "log.txt")
    record.write_text(json.dumps({**made_from, "finished": True}))


def _inputs(command: Sequence[str], recipe: str) -> dict[str, str]:
    """Return the inputs of a run: its command, and hashes of the files and earlier runs that it names."""
    inputs = {"command": " ".join(command), "recipe": _sha256(find_recipe(recipe))}
    for place, name in _named(command, recipe):
        path = Path(name)
        record = path.parent / MADE_FROM  # of <run>/policy, <run>/reward_model
        with suppress(OSError):  # no path: a text that is longer than names of files
            if path.is_file():
                inputs[place] = _sha256(path)
            elif record.exists():
                inputs[place] = _sha256(record)
    return inputs


def _named(command: Sequence[str], recipe: str) -> Iterator[tuple[str, str]]:
    """Yield key and text of what may be a path: in the arguments, and in the recipe where these override nothing."""
    overrides = dict(argument.split("=", 1) for argument in command if "=" in argument)
    for key, value in overrides.items():
        names = value.removeprefix("[").removesuffix("]").split(",")  # [a,b] lists paths
        for index, name in enumerate(names):
            if key != "run_dir" and name:
                yield f"{key}[{index}]" if value.startswith("[") else key, name
    for key, value in _texts(yaml.safe_load(find_recipe(recipe).read_text()), ""):
        if value and key != "run_dir" and key not in overrides:
            yield key, value


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in a recipe with their keys, as models[0].path."""
    match value:
        case str():
            yield key, value
        case dict():
            for name, inner in value.items():
                yield from _texts(inner, f"{key}.{name}" if key else name)
        case list():
            for index, inner in enumerate(value):
                yield from _texts(inner, f"{key}[{index}]")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class RunGrid:
    """Parallel jobs with a progress bar; a failure or Ctrl-C cancels the jobs that have not started.

        with RunGrid(num_jobs=2, num_runs=2) as grid:
            policy = grid.launch("sft", recipe, root / "sft", [])
            grid.launch("dpo", recipe, root / "dpo", [f"model.path={root}/sft/policy"], needs=[policy])

    The end of the block and `wait` wait for the jobs that have started, and raise the exception of the first failure.
    """

    def __init__(self, num_jobs: int, num_runs: int) -> None:
        self._num_jobs, self._pool, self._progress = num_jobs, ThreadPoolExecutor(num_jobs), Progress()
        self._task = self._progress.add_task("runs", total=num_runs)
        self._jobs: list[Future] = []

    def __enter__(self) -> RunGrid:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._progress.stop()

    def launch(
        self, stage: str, recipe: str, run_dir: Path, overrides: Sequence[str], needs: Sequence[Future] = ()
    ) -> Future:
        """Queue `launch_once`.

        Args:
            stage: name of the launch script.
            recipe: recipe of that script.
            run_dir: folder of the run.
            overrides: settings on top, key=value.
            needs: jobs to wait for; a failure of one of them is this job's own.
        """

        def job() -> None:
            for need in needs:
                need.result()
            launch_once(stage, recipe, run_dir, overrides, self._num_jobs)
            self._progress.advance(self._task)

        return self.submit(job)

    def submit(self, job: Callable[..., Any], *args: Any) -> Future:
        """Queue a job; jobs start in the order of submission."""
        self._jobs.append(self._pool.submit(job, *args))
        return self._jobs[-1]

    def wait(self) -> None:
        """Wait until all jobs so far are done; raise the exception of one that failed."""
        for job in as_completed(self._jobs):
            job.result()


def chosen(methods: Mapping[str, Method], only: Sequence[str]) -> dict[str, Method]:
    """Return the methods that the setting `only` names, in their own order; all if it is empty.

    Raises ConfigError for a name that no method has.
    """
    unknown = [name for name in only if name not in methods]
    refuse(bool(unknown), "only", f"names {', '.join(unknown)}, and methods are {', '.join(methods)}")
    return {name: method for name, method in methods.items() if not only or name in only}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95% t-interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)
