"""The folder of a run: ownership, contents, resume, and graceful shutdown.

The contract (docs/recipes.md): `config.yaml`, `metrics.jsonl`, `samples.jsonl`, `resets.jsonl` (runs with resets),
`checkpoints/step_<n>/` and, at the end, the result (`policy/` or `reward_model/`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from drpo.config import ConfigError, Section, load_recipe, save_resolved, setting
from drpo.config_help import options
from drpo.engine import Engine
from drpo.run.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    read_trainer_state,
    save_checkpoint,
)
from drpo.run.lock import hold_folder, release_folder
from drpo.run.metrics import JsonLines
from drpo.run.same_view import require_same, require_shared_folder
from drpo.run.sample_table import sample_table
from drpo.run.signals import handles_signals

# Keys and sections that do not change the results: they may differ when a run resumes.
FREE_ON_RESUME = (
    "run_dir",
    "resume",
    "log",
    "checkpoint",
    "engine.trackers",
    "engine.project",
    "engine.timeout_minutes",
    "reward.url",  # the model there is compared by its identity
    "reward.server.timeout_minutes",
    "reward.server.request_seconds",
    "reward.server.num_requests",
    "reward.server.expected_path",
)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Schedule of checkpoints and the number to keep."""

    every: int = setting(50, ge=0)
    """Save after every so many steps; 0 saves at the end only."""
    keep: int = setting(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    model_every: int = setting(0, ge=0)
    """Write the model as it is after every so many steps, as a folder of its own (policy_step_20, ...) that stays and
    that launch/compare.py can put on a curve; 0 for the end only."""


@dataclass(frozen=True)
class LogConfig(Section):
    """Console output and sample rows, and how often they appear."""

    every: int = setting(1, ge=1)
    """Show a line on the console after every so many steps (metrics.jsonl gets every step)."""
    samples_every: int = setting(20, ge=0)
    """Online runs only: write sample rollouts after the first step and then every so many steps; 0 for never. Every
    evaluation writes its completions besides."""
    num_samples: int = setting(4, ge=1)
    """Rollouts a sample has, and completions shown on the console (samples.jsonl gets all of an evaluation)."""


Resume = Literal["auto", "restart"]
Callback = Callable[[int, Mapping[str, float]], None]
"Called with the step and its metrics, on the main process."


class RunFolder:
    """The folder of one run, on every rank; only the main process writes outside `checkpoints/`.

    Making one raises ConfigError when the processes have different settings, or do not share the folder.
    """

    def __init__(self, recipe: Any, engine: Engine, callbacks: Sequence[Callback] = ()) -> None:
        self.path = Path(recipe.run_dir)
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.samples = JsonLines(self.path / "samples.jsonl")
        self.resets = JsonLines(self.path / "resets.jsonl")
        # With null replaced by the chosen precision: it depends on the machine, and the folder may move to another.
        precise = dataclasses.replace(recipe.engine, mixed_precision=engine.precision)
        self.recipe = dataclasses.replace(recipe, engine=precise)
        self.engine, self._checkpoint, self.log = engine, recipe.checkpoint, recipe.log
        self._callbacks = callbacks
        self._console = Console()
        self._progress: Progress | None = None
        self._data: str | None = None
        self._signal: int | None = None
        self._handlers_before: dict[int, Any] = {}
        require_same(engine, {k: v for k, v in flatten(self.recipe).items() if k != "run_dir"}, "settings")
        require_shared_folder(engine, self.path, "run_dir")

    # --- opening ----------------------------------------------------------------------------------------

    def open(self) -> dict[str, Any] | None:
        """Create the folder or resume its run; return the saved trainer state, None for a fresh run.

        Raises CheckpointError when the folder holds a run with other settings or on other data, or another process is
        training there.
        """
        engine = self.engine
        self._lock()
        if engine.is_main and self.recipe.resume == "restart":
            self._set_aside()
            hold_folder(self.path)
        engine.barrier()
        config = self.path / "config.yaml"
        # The main process checks for all: a network file system may show an older state to another one.
        checkpoints = [folder.name for folder in list_checkpoints(self.path)]
        has_metrics = config.exists() and _holds_something(self.metrics.path)
        checkpoints, has_metrics = engine.from_main((checkpoints, has_metrics))
        state = None
        if checkpoints:
            last = self.path / "checkpoints" / checkpoints[-1]
            saved = read_trainer_state(last)
            self._refuse_other_settings(saved["settings"])
            self._refuse_other_data(saved.get("data"))
            state = load_checkpoint(engine, last)
            self.say(f"resuming {self.path} after step {state['step']}")
        elif has_metrics:
            # Killed before its first checkpoint: the same run starts again. A run that failed at once may be changed.
            self._refuse_other_settings(self._settings_of_the_earlier_run(config))
        engine.barrier()  # all processes have checked before the main one writes
        if engine.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            step = state["step"] if state else -1
            for lines in (self.metrics, self.samples, self.resets):
                lines.keep_up_to(step)
            save_resolved(self.recipe, self.path / "config.yaml")
        engine.start_trackers(flatten(self.recipe))
        for number in (signal.SIGTERM, signal.SIGINT) if handles_signals() else ():
            self._handlers_before[number] = signal.signal(number, self._on_signal)
        engine.barrier()
        return state

    def _settings_of_the_earlier_run(self, config: Path) -> dict[str, Any]:
        try:
            return flatten(load_recipe(type(self.recipe), config, []))
        except ConfigError as error:
            raise CheckpointError(
                f"{config}, left by an earlier run, is no recipe of today: {error}\nChoose another run_dir, or "
                "resume=restart to move that run aside"
            ) from None

    def _lock(self) -> None:
        problem = None
        if self.engine.is_main:
            try:
                hold_folder(self.path)
            except BlockingIOError:
                problem = (
                    f"another process is training in {self.path}; wait for it or stop it, or choose another "
                    "run_dir"
                )
        if (problem := self.engine.from_main(problem)) is not None:
            raise CheckpointError(problem)

    def _set_aside(self) -> None:
        if all(path.name == "config.yaml" and not _holds_something(path) for path in self.path.iterdir()):
            return  # created by hold_folder
        release_folder(self.path)
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        shutil.move(self.path, target)
        self.say(f"moved the earlier run to {target}")

    def _refuse_other_settings(self, saved: dict[str, Any]) -> None:
        current = flatten(self.recipe)
        defaults = {option.key: _as_json(option.default) for option in options(type(self.recipe))}
        saved = defaults | saved  # keys that the saved run did not have yet take their defaults
        free = tuple(f"{key}." for key in FREE_ON_RESUME)
        changed = [
            f"{key}: {saved.get(key)!r} -> {current.get(key)!r}"
            for key in sorted(saved | current)
            if not f"{key}.".startswith(free) and current.get(key) != saved.get(key)
        ]
        if changed:
            key = "engine.mixed_precision"
            differs = key in saved and saved[key] != current[key]
            advice = f"{key}={saved[key]} to keep that run's precision, " if differs else ""
            raise CheckpointError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. "
                f"Choose {advice}another run_dir, or resume=restart to move that run aside"
            )

    def _refuse_other_data(self, saved: str | None) -> None:
        """Refuse data that differs; checkpoints of earlier versions (None) do not say what theirs was."""
        if saved not in (None, self._data):
            raise CheckpointError(
                f"{self.path} holds a run on other training data than there is now: a row was added, removed, moved or "
                "changed, or is encoded otherwise (tokenizer, chat template). Give it the earlier data, choose another "
                "run_dir, or resume=restart to move that run aside"
            )

    # --- during the run ---------------------------------------------------------------------------------

    def save(self, step: int, num_steps: int, state: dict[str, Any], always: bool = False) -> None:
        """Save a checkpoint when due: every `checkpoint.every` steps, at the end, and on SIGTERM or SIGINT.

        `always` saves now. After a signal the process saves, then exits with code 128 + signal.
        """
        stop = int(self.engine.max(self._signal or 0))
        every = self._checkpoint.every
        if stop or always or step == num_steps or (every and step % every == 0):
            full = {"settings": flatten(self.recipe), "data": self._data,
                    "world_size": self.engine.world_size, **state}  # fmt: skip
            folder = save_checkpoint(self.engine, self.path, step, full, self._checkpoint.keep)
            if stop:
                self._leave(stop, f"saved {folder}; run the same command again to go on from step {step}")

    def leave(self) -> None:
        """Exit after a signal as `save` does, where the state cannot be saved: the last checkpoint stays."""
        stop = int(self.engine.max(self._signal or 0))
        self._leave(stop, "run the same command again to go on from the last checkpoint, if there is one")

    def _leave(self, stop: int, said: str) -> None:
        self.say(f"{signal.Signals(stop).name}: {said}")
        self.close()
        raise SystemExit(128 + stop)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._signal is not None:  # second signal: exit at once
            os._exit(128 + number)
        self._signal = number
        self.engine.stop_requested.set()

    def record(self, step: int, metrics: dict[str, float], shown: tuple[str, ...]) -> None:
        """Write a row to metrics.jsonl, the trackers, and (every `log.every` steps) the console."""
        if not self.engine.is_main:
            return
        self.metrics.write({"step": step, **metrics})
        self.engine.log(metrics, step)
        for callback in self._callbacks:
            callback(step, metrics)
        if step % self.log.every == 0 or step <= 1:
            self.say(
                f"step {step}: " + "  ".join(_shown(key, metrics[key]) for key in shown if key in metrics)
            )

    def write_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write sample rows to samples.jsonl, the first few to the console."""
        if self.engine.is_main and rows:
            self.samples.write(*({"step": step, **row} for row in rows))
            self.say(sample_table(rows[: self.log.num_samples], step))

    def write_resets(self, step: int, row: Mapping[str, Any]) -> None:
        """Write a step's row of resets.jsonl."""
        if self.engine.is_main:
            self.resets.write({"step": step, **row})

    def start_progress(self, description: str, done: int, total: int) -> None:
        """Show a progress bar, replacing an earlier one."""
        if self.engine.is_main:
            if self._progress is not None:
                self._progress.stop()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            columns += (TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
            self._progress.start()
            self._progress.add_task(description, total=total, completed=done)

    def advance(self, count: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], count)

    def take_data(self, report: str, digest: str) -> None:
        """Print the report on the data, and note its digest for the checkpoints.

        Raises ConfigError when the processes have read different data.
        """
        require_same(self.engine, {"data": report, "digest of the training rows": digest}, "data")
        self._data = digest
        self.say(report)

    def say(self, *messages: object) -> None:
        """Print each message, on the main process."""
        for message in messages if self.engine.is_main else ():
            self._console.print(message, highlight=False, soft_wrap=isinstance(message, str), markup=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers_before = {}
        self.engine.close()


def _shown(key: str, value: float) -> str:
    """Format a metric for the console, without its group unless that is needed to distinguish it."""
    group, _, name = key.rpartition("/")
    if group == "time":
        return f"{value:.2f} s"
    return f"{'eval ' if group == 'eval' else ''}{name} {value:.4g}"


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config dataclass to `section.key` -> JSON value."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, key + ".")
        else:
            flat[key] = _as_json(value)
    return flat


def _as_json(value: object) -> Any:
    return json.loads(json.dumps(value, default=_section_as_json))


def _section_as_json(value: object) -> Any:
    """Return the settings of a section in a list that are not at their defaults, as a later version may have more."""
    if isinstance(value, Section):
        return {name: getattr(value, name) for name in value.changed()}
    return str(value)
