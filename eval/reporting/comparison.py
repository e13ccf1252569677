"""The content of comparison.json as typed rows: written by eval.comparing, read by the report and the console."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from drpo.data.records import DataError
from eval.judging.verdict import Order, Status, Winner
from eval.reporting.results_file import read_results

Count = Annotated[int, Field(strict=True, ge=0)]
Digits = Annotated[int, Field(strict=True, ge=0, le=15)]
"A double has no more."
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; None where it is not defined."""

    value: Number | None
    low: Number | None
    high: Number | None


@dataclass(frozen=True)
class RunsEstimate(Estimate):
    """An estimate over several runs, with the value of each run."""

    runs: tuple[Number | None, ...]
    method: str | None = None
    "What was resampled or assumed for the interval."


@dataclass(frozen=True)
class JudgeRow:
    """The judge and its question; `spent` are its calls, tokens and dollars."""

    kind: str
    name: str
    prompt: str | None
    orders: Literal["both", "one"]
    ties: Flag
    spent: dict[str, Number | None] | None


@dataclass(frozen=True)
class MeasureRow:
    """A column of the table."""

    key: str
    name: str
    unit: str
    "% for shares in [0, 1] that are shown times 100, else nats, tokens, or nothing."
    digits: Digits
    better: Literal["high", "low"] | None
    help: str


@dataclass(frozen=True)
class JudgedRow:
    """Counts of comparisons with the baseline, and statistics of the verdicts; shares are in [0, 1]."""

    wins: Count
    ties: Count
    losses: Count
    undecided: Count
    worst_case: Number | None
    "The win rate if every undecided comparison were lost; `best_case`: if every one were won."
    best_case: Number | None
    consistent: Number | None
    "Share of comparisons with the same verdict in both orders, with its interval."
    consistent_low: Number | None
    consistent_high: Number | None
    first_slot_wins: Number | None
    "Share won by the response shown first; `first_slot_p` tests it against one half."
    first_slot_p: Number | None
    statuses: dict[str, Count]


@dataclass(frozen=True)
class SystemRow:
    """One system: its value of every measure (None without one), by the key of the measure."""

    name: str
    method: str
    setting: Number | None
    policies: tuple[str, ...]
    num_runs: Count
    num_prompts: Count
    values: dict[str, RunsEstimate | None]
    judged: JudgedRow | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DifferenceRow:
    """A paired test of system 1 minus system 2; without a difference `reason` is the cause."""

    measure: str
    system_1: str
    system_2: str
    difference: Number | None
    low: Number | None
    high: Number | None
    p_value: Number | None
    p_holm: Number | None
    num_prompts: Count
    over: str | None
    detectable: Number | None
    reason: str | None


@dataclass(frozen=True)
class MatchRow(Estimate):
    """Two systems judged against each other; the estimate is the win rate of system 1."""

    system_1: str
    system_2: str
    wins: Count
    ties: Count
    losses: Count
    undecided: Count
    num_prompts: Count


@dataclass(frozen=True)
class RankedSystem:
    """A system's place on the Elo scale."""

    name: str
    elo: Number
    low: Number | None
    high: Number | None


@dataclass(frozen=True)
class Ranking:
    """Systems on one scale relative to `anchor`, or to their mean where it is None."""

    systems: tuple[RankedSystem, ...]
    anchor: str | None
    num_comparisons: Count
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FrontierRow:
    """A system at its KL and its reward."""

    system: str
    method: str
    kl: Estimate
    reward: Estimate
    on_front: Flag


@dataclass(frozen=True)
class Frontier:
    """Every system with a KL, against the measure `reward`."""

    reward: str
    points: tuple[FrontierRow, ...]


@dataclass(frozen=True)
class CurvePoint(Estimate):
    """The value of a measure at one setting of a method."""

    system: str
    method: str
    setting: Number


@dataclass(frozen=True)
class Curve:
    """A measure over the setting of an ablation."""

    setting: str
    measure: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class VerdictRow:
    """The judge's verdict in one order; `text` is its raw answer."""

    order: Order
    status: Status
    winner: Winner | None
    text: str | None
    detail: str


@dataclass(frozen=True)
class Example:
    """A system's response (a) and the baseline's (b) to one prompt; `prefix_a` counts the forced characters of a."""

    id: str
    prompt_id: str
    prompt: str
    system: str
    run: Count
    baseline: str
    response_a: str
    response_b: str
    ended_a: Flag | None
    ended_b: Flag | None
    prefix_a: Count
    score: Number | None
    consistent: Flag | None
    verdicts: tuple[VerdictRow, ...]
    suspicions_a: tuple[str, ...]
    suspicions_b: tuple[str, ...]
    values: dict[str, Number | None]


@dataclass(frozen=True)
class RolloutRow:
    """A training rollout: the policy wrote `continuation` after the forced `prefix`."""

    system: str
    step: Count
    prompt: str
    prefix: str
    continuation: str
    ended: Flag | None
    scores: dict[str, Number | None]


@dataclass(frozen=True)
class Description:
    """The run itself: title, versions, and the judge (None where nothing was judged)."""

    title: str
    task: str
    created: str
    commit: str | None
    versions: dict[str, str]
    judge: JudgeRow | None


@dataclass(frozen=True)
class Findings:
    """All results. Configs and hashes are by system and run.

    Raises DataError unless they fit together: keys of measures, names of systems and ids of examples are unique, every
    system has a value (or None) for every measure, and every row about a measure names a known one.
    """

    baseline: str
    measures: tuple[MeasureRow, ...]
    systems: tuple[SystemRow, ...]
    tests: tuple[DifferenceRow, ...]
    matches: tuple[MatchRow, ...]
    ranking: Ranking | None
    frontiers: tuple[Frontier, ...]
    curves: tuple[Curve, ...]
    examples: tuple[Example, ...]
    rollouts: tuple[RolloutRow, ...]
    configs: dict[str, str]
    hashes: dict[str, dict[str, str]]

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise _refused(fault)

    def _faults(self) -> Iterator[str]:
        keys = [measure.key for measure in self.measures]
        yield from _repeats("measures", "key", keys)
        yield from _repeats("systems", "name", [system.name for system in self.systems])
        yield from _repeats("examples", "id", [example.id for example in self.examples])
        for i, system in enumerate(self.systems):
            for key in keys:
                if key not in system.values:
                    yield f"systems[{i}].values.{key} is missing; null stands for a value that there is not"
        named = {f"tests[{i}].measure": test.measure for i, test in enumerate(self.tests)}
        named |= {f"curves[{i}].measure": curve.measure for i, curve in enumerate(self.curves)}
        named |= {f"frontiers[{i}].reward": front.reward for i, front in enumerate(self.frontiers)}
        for path, key in named.items():
            if key not in keys:
                yield f"{path} must be the key of a measure, got {key!r}"
        for i, example in enumerate(self.examples):
            length = len(example.response_a)
            if example.prefix_a > length:
                yield (
                    f"examples[{i}].prefix_a must be at most the {length} characters of response_a, "
                    f"got {example.prefix_a}"
                )


@dataclass(frozen=True)
class Comparison(Findings, Description):
    """The whole of comparison.json."""


def comparison_from(content: Any) -> Comparison:
    """Convert parsed JSON to a Comparison; unknown fields are ignored.

    Raises DataError with the path of a field that is missing or has a wrong type, such as systems[0].values.kl.
    """
    try:
        return TypeAdapter(Comparison).validate_python(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    if fault["type"] == "value_error":
        raise fault["ctx"]["error"]
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"])
    path = path.removeprefix(".") or "the whole"
    if fault["type"] == "missing":
        raise _refused(f"{path} is missing")
    expected = "a mapping" if fault["type"] == "dataclass_type" else fault["msg"]
    expected = (
        expected.removeprefix("Input should be ").replace("tuple", "list").replace("dictionary", "mapping")
    )
    got = repr(fault["input"])
    if len(got) > 60:
        got = f"{type(fault['input']).__name__} {got[:57]}..."
    raise _refused(f"{path} must be {expected}, got {got}")


def read_comparison(path: Path | str) -> Comparison:
    """Read a comparison.json, or the one in a folder. Raises DataError when there is none or it is not valid."""
    path = Path(path)
    file = path / "comparison.json" if path.is_dir() else path
    return comparison_from(read_results(file, "comparison", "launch/compare.py"))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json into `folder`. Raises ValueError for nan and infinity."""
    text = json.dumps(comparison, default=vars, allow_nan=False, ensure_ascii=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")


def _refused(fault: str) -> DataError:
    return DataError(f"the comparison cannot be shown: {fault}. launch/compare.py writes one that can")


def _repeats(section: str, field: str, names: Sequence[str]) -> Iterator[str]:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            yield f"{section}[{i}].{field} must be unique, {name!r} is there already"
        seen.add(name)
