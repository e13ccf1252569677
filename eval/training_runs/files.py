"""Read the folder of an online run, finished or still going."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drpo.data.records import DataError
from drpo.jsonl import lines_of, object_in
from drpo.trainers.drawn_resets import NUM_BINS

METRICS = "metrics.jsonl"
"Name of the file by which a run folder is known."
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a run by dotted key, the versions it ran with, and the rows of its files."""

    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: tuple[Row, ...]
    samples: tuple[Row, ...]
    "Sample rollouts; those of evaluations are left out."
    resets: tuple[Row, ...] | None
    "None for a run that did not record them."

    @property
    def has_resets(self) -> bool:
        """Whether rollouts could start from a prefix."""
        return self.settings["reset.proportion"] > 0


def read_run(folder: Path) -> TrainingRun:
    """Read a run folder; an unfinished last line of a file, which a run is writing, is left out.

    Raises DataError, naming the file, for one that is missing or damaged, and for a run that is not an online one.
    """
    settings, versions = _read_config(folder / "config.yaml")
    metrics = _read_rows(folder / METRICS, _check_metrics)
    if metrics is None:
        raise DataError(f"no metrics at {folder / METRICS}; a run writes them with its first step")
    samples = _read_rows(folder / "samples.jsonl", _check_sample) or ()
    return TrainingRun(
        settings=settings,
        versions=versions,
        metrics=metrics,
        samples=tuple(row for row in samples if row["split"] == "rollout"),
        resets=_read_rows(folder / "resets.jsonl", _check_resets),
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"no recipe at {path}: {error.strerror}; every run writes its own there") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); {_RESTORE}") from None
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path} is not YAML ({' '.join(str(error).split())}); {_RESTORE}") from None
    settings = dict(_flat(config)) if isinstance(config, dict) else {}
    missing = [key for key in ("reset.proportion", "rollout.batch_size", "num_steps") if key not in settings]
    if missing:
        raise DataError(
            f"{path} is not of an online run, as it has no {', '.join(missing)}; expected a folder that "
            "launch/drpo.py or launch/ppo.py has trained in"
        )
    for key, types in (("reset.proportion", (int, float)), ("num_steps", (int,))):
        if isinstance(settings[key], bool) or not isinstance(settings[key], types):
            raise DataError(f"{path}: {key} must be a number, got {settings[key]!r}; {_RESTORE}")
    return settings, dict(re.findall(r"^# (\w+): (.*)$", text, re.MULTILINE))


_RESTORE = "put back the file that the run wrote"


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in config.items():
        key = f"{prefix}{name}"
        flat += _flat(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return flat


# --- rows -------------------------------------------------------------------------------------------------


def _read_rows(path: Path, check: Callable[[Row], str | None]) -> tuple[Row, ...] | None:
    """Read the complete lines of a JSONL file, None if there is no file; `check` returns what is wrong with a row."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in lines_of(content[: content.rfind(b"\n") + 1]):
        place = f"{path}:{number}"
        row = object_in(line, place)
        problem = check(row) if _is_count(row.get("step")) else "has no step"
        if problem is not None:
            raise DataError(f"{place} {problem}; remove the line, or look at a folder that is whole")
        rows.append(row)
    return tuple(rows)


MOST = 10**12
"Above what a step, a length or a number of rollouts is damage."


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _check_metrics(row: Row) -> str | None:
    wrong = [
        key
        for key, value in row.items()
        if isinstance(value, bool)
        or not isinstance(value, int | float)
        or (isinstance(value, int) and abs(value) > MOST)
    ]
    return f"has no number as {wrong[0]}" if wrong else None


def _check_sample(row: Row) -> str | None:
    texts = all(isinstance(row.get(name), str) for name in ("split", "prompt", "prefix", "continuation"))
    scores = row.get("scores")
    if (
        texts
        and isinstance(scores, dict)
        and not _check_metrics(scores)
        and isinstance(row.get("ended"), bool)
    ):
        return None
    return "is no sample: expected split, prompt, prefix, continuation, ended, scores"


def _check_resets(row: Row) -> str | None:
    lengths, fractions = row.get("lengths"), row.get("fractions")
    if not isinstance(lengths, dict) or not all(
        key.isdecimal() and len(key) <= len(str(MOST)) for key in lengths
    ):
        return "has no lengths: expected counts by forced tokens"
    if not isinstance(fractions, list) or len(fractions) != NUM_BINS + 1:
        return f"has no fractions: expected {NUM_BINS + 1} counts"
    if not all(map(_is_count, [*lengths.values(), *fractions])):
        return "has other values than counts in lengths or fractions"
    return (
        None if sum(fractions) == sum(lengths.values()) > 0 else "has lengths and fractions of unequal sums"
    )
