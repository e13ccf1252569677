"""People's verdicts on matchups, on disk: an append-only file with one JSON line per decision.

    {"prompt_id": "9c1185a5c5e9fc54", "system_a": "drpo", "system_b": "ppo", "seed": 0, "annotator": "anna",
     "order": "ba", "status": "labelled", "winner": "a", "hash_a": "...", "hash_b": "...", "length_a": 88,
     "length_b": 120, "question": "tldr-1", "seconds": 11.2, "confidence": null, "time": "2026-11-21T09:00:00+00:00"}

The last row of an annotator on a matchup counts. The hashes are those of the two texts that were shown, so a label is
never used for other texts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

from drpo.data.records import BadRows, DataError, RowError
from drpo.jsonl import fields_of_line, lines_of
from eval.judging.matchup import Matchup, Order
from eval.judging.verdict import Winner

Status = Literal["labelled", "skipped", "undone"]
"""labelled: there is a winner or a tie. skipped: the annotator gave no verdict. undone: the annotator's previous row
on this matchup is withdrawn."""
Key = tuple[str, str, str, int]
"prompt_id, system_a, system_b, seed: the key of a matchup."
key_of = attrgetter("prompt_id", "system_a", "system_b", "seed")
"The key of a matchup, or of the matchup of a label or judgment."

MAX_NAME = 40
ANNOTATOR = re.compile(rf"[^\W_][\w .-]{{0,{MAX_NAME - 1}}}")
_LINE_START = b'{"prompt_id": "'
"Start of every row, including one truncated by a kill."
_SCORE = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True, slots=True)
class Label:
    """One annotator's verdict on one matchup; `winner` refers to the systems, not to the order shown."""

    prompt_id: str
    system_a: str
    system_b: str
    seed: int
    annotator: str
    order: Order | None
    "Which response was shown first; None where unknown."
    status: Status
    winner: Winner | None
    "None unless status is labelled."
    hash_a: str
    "First 16 hex digits of the sha256 of system a's response."
    hash_b: str
    length_a: int
    "Characters of system a's response."
    length_b: int
    question: str | None
    "Name of the prompt, such as tldr-1; None where unknown."
    seconds: float | None
    "Time since the matchup was shown."
    confidence: float | None
    "The annotator's confidence, on the data's own scale."
    time: str

    def __post_init__(self) -> None:
        if (self.status == "labelled") != (self.winner is not None):
            raise ValueError(f"a label that is {self.status} cannot have the winner {self.winner}")

    @property
    def key(self) -> Key:
        """Key of the labelled matchup."""
        return key_of(self)

    @property
    def score(self) -> float | None:
        """Share of the win that goes to system a: 1, 0.5, 0; None without a verdict."""
        return None if self.winner is None else _SCORE[self.winner]

    @property
    def first_slot_won(self) -> float | None:
        """1 if the response that was shown first won, 0.5 for a tie; None without a verdict or a known order."""
        if self.winner is None or self.order is None:
            return None
        return self.score if self.order == "ab" else 1 - self.score


def text_hash(text: str) -> str:
    """Return the first 16 hex digits of the SHA-256 of a response."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label_of(
    matchup: Matchup,
    annotator: str,
    status: Status,
    winner: Winner | None,
    order: Order | None,
    question: str | None = None,
    seconds: float | None = None,
    confidence: float | None = None,
) -> Label:
    """Make a label on a matchup with the current time.

    Args:
        matchup: The matchup; its key, hashes and lengths are copied.
        annotator: Name of the annotator.
        status: Kind of the row.
        winner: a, b or tie; None unless the status is labelled.
        order: Order in which the responses were shown; None if unknown.
        question: Name of the prompt.
        seconds: Time since the matchup was shown.
        confidence: The annotator's confidence, on the data's own scale.
    """
    texts = matchup.shown("ab")
    verdict = (annotator, order, status, winner)
    hashes_and_lengths = (*map(text_hash, texts), *map(len, texts))
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Label(*key_of(matchup), *verdict, *hashes_and_lengths, question, seconds, confidence, time)


def checked_annotator(name: Any) -> str:
    """Return an annotator's name in normal form. Raises ValueError for an invalid one."""
    if not isinstance(name, str):
        raise ValueError("the annotator's name must be text")
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not name:
        raise ValueError("the annotator's name is empty; give a name of 1 to 40 letters or digits")
    if not ANNOTATOR.fullmatch(name):
        rule = f"1 to {MAX_NAME} letters, digits, spaces and . _ -, a letter or digit first"
        raise ValueError(f"{name[:MAX_NAME]!r} is not an annotator's name: {rule}")
    return name


# --- reading --------------------------------------------------------------------------------------------


def read_labels(path: Path | str) -> list[Label]:
    """Read all rows of a labels file, in order; `current_labels` selects those that count.

    Raises DataError for a missing file, a partial last line, and for bad rows, all counted.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no labels file {path}; launch/label.py makes one")
    content = path.read_bytes()
    if content.rpartition(b"\n")[2].strip():
        raise DataError(
            f"{path} ends in an unfinished line: the server that wrote it was killed. That label did not count; "
            "start launch/label.py on it again, which cuts the line off"
        )
    bad, labels = BadRows(), []
    for number, line in lines_of(content):
        try:
            labels.append(_label_of_line(line))
        except RowError as error:
            bad.add(error.kind, f"{path.name}:{number}", error.detail)
    if bad:
        raise DataError(f"{path} cannot be used, {len(bad)} rows are bad:\n{bad.summary()}")
    return labels


def current_labels(labels: Iterable[Label]) -> list[Label]:
    """Return the last row of each annotator and matchup, unless it undoes the label."""
    last: dict[tuple[str, Key], Label] = {}
    for label in labels:
        last.pop((label.annotator, label.key), None)  # so that the order is that of the last rows
        last[label.annotator, label.key] = label
    return [label for label in last.values() if label.status != "undone"]


def load_labels(paths: Sequence[Path | str]) -> list[Label]:
    """Read the current labels of several files. Raises DataError if two files have one annotator's on a matchup."""
    seen: dict[tuple[str, Key], Path | str] = {}
    labels = []
    for path in paths:
        for label in current_labels(read_labels(path)):
            place = label.annotator, label.key
            if place in seen:
                raise DataError(
                    f"{path} and {seen[place]} both hold what {label.annotator} said of prompt {label.prompt_id}, "
                    f"{label.system_a} against {label.system_b}; give each label once"
                )
            seen[place] = path
            labels.append(label)
    return labels


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt_id", "system_a", "system_b", "annotator"), (str,)),
    **dict.fromkeys(("status", "hash_a", "hash_b", "time"), (str,)),
    **dict.fromkeys(("seed", "length_a", "length_b"), (int,)),
    **dict.fromkeys(("order", "winner", "question"), (str, type(None))),
    **dict.fromkeys(("seconds", "confidence"), (int, float, type(None))),
}
_CHOICES = {
    "order": (*get_args(Order), None),
    "status": get_args(Status),
    "winner": (*get_args(Winner), None),
}


def _label_of_line(line: bytes) -> Label:
    values = fields_of_line(line, _TYPES)
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise RowError("unknown value", f"{name} is {values[name]!r}")
    for name in ("seconds", "confidence"):
        number_of_row(values[name], name)
    if values["annotator"] != annotator_of_row(values["annotator"]):
        raise RowError("bad annotator", f"{values['annotator']!r} is not how launch/label.py writes a name")
    try:
        return Label(**values)
    except ValueError as error:
        raise RowError("status and winner differ", str(error)) from None


def number_of_row(value: Any, name: str) -> float | None:
    """Return a number, or None where there is none. Raises RowError for other types, nan and infinities."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("wrong type", f"{name} is {value!r}, not a number")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise RowError("number out of range", f"{name} is {str(value)[:20]}")
    return float(value)


def annotator_of_row(name: Any) -> str:
    """Return an annotator's name in normal form. Raises RowError for an invalid one."""
    try:
        return checked_annotator(name)
    except ValueError as error:
        raise RowError("bad annotator", str(error)) from None


# --- writing --------------------------------------------------------------------------------------------


class LabelsWriter(AbstractContextManager):
    """A labels file to append to: a label is on disk when `append` returns.

    `labels` contains the existing rows. A partial last line left by a kill is truncated, and `num_cut` is its number of
    bytes. The file is locked while it is open, since two servers on it would not see each other's labels.
    Raises DataError when it is locked already, and when its end is not explained by a kill.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cut_unfinished_line()
            self.labels = read_labels(self.path)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{self.path} is open in another run of launch/label.py: stop that one") from None
        except DataError:
            self._file.close()
            raise

    def append(self, labels: Sequence[Label]) -> None:
        """Append rows. Raises OSError, with the file unchanged, when they cannot be written."""
        lines = "".join(json.dumps(asdict(label), ensure_ascii=False) + "\n" for label in labels).encode()
        if self._file.closed:
            raise OSError(errno.EBADF, "the server has ended", str(self.path))
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, "only a part was written", str(self.path))
            os.fsync(self._file)
        except OSError:
            self._file.truncate(size)  # a partial line would corrupt the next one
            raise

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cut_unfinished_line(self) -> None:
        lines, newline, last_line = self.path.read_bytes().rpartition(b"\n")
        if last_line and not (last_line.startswith(_LINE_START) or _LINE_START.startswith(last_line)):
            end = repr(last_line[:40])
            raise DataError(f"{self.path} does not end in a label, but in {end}; it is left as it is")
        if last_line.endswith(b"}"):
            raise DataError(
                f"{self.path} ends in a whole label without a line break: was it edited? Add the line break if the "
                "label is to count, or remove the line"
            )
        self.num_cut = len(last_line)
        os.truncate(self.path, len(lines) + len(newline))
