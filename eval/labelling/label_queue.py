"""Queue of matchups to label: each annotator's own order, the labels so far, and undo."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

from drpo.data.records import BadRows, DataError
from eval.judging.matchup import Matchup, Order
from eval.judging.openai.pairwise import PairwisePrompt
from eval.judging.verdict import winner_of
from eval.labelling.labels import (
    Label,
    LabelsWriter,
    checked_annotator,
    current_labels,
    key_of,
    label_of,
    text_hash,
)

Choice = Literal["first", "second", "tie", "skip"]
MAX_SECONDS = 1e6


class RequestRefused(Exception):
    """An invalid request of an annotator; `code` is its HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class LabelQueue:
    """The matchups of one labels file, for several concurrent annotators, each of whom labels all of them.

    The queue never exposes the name of a system: `state` shows a matchup under a number that is drawn anew for each
    queue, its responses as first and second. Both the order of the matchups and which response is shown first are
    functions of (seed, annotator, matchup) alone.
    """

    def __init__(
        self,
        matchups: Sequence[Matchup],
        writer: LabelsWriter,
        prompt: PairwisePrompt,
        ties: bool,
        annotators: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Open a queue on the labels of `writer`.

        Args:
            matchups: Matchups to label.
            writer: Labels file, with the labels so far.
            prompt: The question.
            ties: Whether annotators may call a tie.
            annotators: Names that may label; empty allows any name.
            seed: Seed of the orders.

        Raises DataError when the file contains labels of other texts or of another question.
        """
        self.prompt, self.ties, self.seed = prompt, ties, seed
        self._writer = writer
        self._lock = threading.Lock()
        self._allowed = tuple(annotators)
        self._by_id = {secrets.token_hex(8): matchup for matchup in matchups}
        self._orders: dict[str, list[str]] = {}
        self._done: dict[str, dict[str, Label]] = {}  # annotator -> pair -> label, the latest last
        self._load_labels()

    def __len__(self) -> int:
        return len(self._by_id)

    def close(self) -> None:
        """Close the labels file; later choices are not stored and raise."""
        with self._lock:
            self._writer.close()

    def progress(self) -> dict[str, int]:
        """Return the number of matchups each known annotator has finished."""
        with self._lock:
            names = dict.fromkeys((*self._allowed, *self._done))
            return {name: len(self._done.get(name, {})) for name in names}

    def state(self, name: Any) -> dict[str, Any]:
        """Return the next matchup, if any, and the progress. Raises RequestRefused for a name that may not label."""
        with self._lock:
            return self._state(self._annotator(name))

    def choose(self, name: Any, pair: Any, choice: Any, seconds: Any) -> dict[str, Any]:
        """Store an annotator's verdict on a matchup, and return the new state.

        Raises RequestRefused, and stores nothing, unless it is the first valid verdict on one of the matchups.
        """
        with self._lock:
            annotator = self._annotator(name)
            if choice not in get_args(Choice):
                raise RequestRefused(400, f"choice must be one of {', '.join(get_args(Choice))}")
            if choice == "tie" and not self.ties:
                raise RequestRefused(400, "ties are not allowed here: choose one of the two, or skip")
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not (is_number and 0 <= seconds <= MAX_SECONDS):
                raise RequestRefused(400, f"seconds must be a number between 0 and {MAX_SECONDS:g}")
            if not isinstance(pair, str) or pair not in self._by_id:
                raise RequestRefused(404, "there is no such pair")
            if pair in self._done.get(annotator, {}):
                raise RequestRefused(409, "this pair is labelled already, perhaps in another window")
            matchup = self._by_id[pair]
            order = self._slots(annotator, matchup)
            winner = None if choice == "skip" else winner_of(choice, order)
            status = "skipped" if choice == "skip" else "labelled"
            seconds = round(float(seconds), 2)
            label = label_of(matchup, annotator, status, winner, order, self.prompt.name, seconds)
            self._writer.append([label])
            self._done.setdefault(annotator, {})[pair] = label
            return self._state(annotator)

    def undo(self, name: Any, pair: Any) -> dict[str, Any]:
        """Undo an annotator's last label, which must be that of `pair`, and return the new state."""
        with self._lock:
            annotator = self._annotator(name)
            done = self._done.get(annotator, {})
            if not done:
                raise RequestRefused(409, "there is nothing to undo")
            if not isinstance(pair, str) or pair != next(reversed(done)):
                raise RequestRefused(409, "this is not the last label, perhaps because of another window")
            matchup, label = self._by_id[pair], done[pair]
            self._writer.append([label_of(matchup, annotator, "undone", None, label.order, self.prompt.name)])
            del done[pair]
            return self._state(annotator, pair)

    # --- what an annotator sees ---------------------------------------------------------------------------

    def _state(self, annotator: str, shown: str | None = None) -> dict[str, Any]:
        """Return the state with the pair `shown`, by default the annotator's first one without a label."""
        done = self._done.get(annotator, {})
        pair = shown or next((pair for pair in self._order(annotator) if pair not in done), None)
        counts = Counter(label.winner or label.status for label in done.values())
        return {
            "annotator": annotator,
            "question": self.prompt.question,
            "material": self.prompt.material,
            "noun": self.prompt.noun,
            "ties": self.ties,
            "total": len(self._by_id),
            "done": len(done),
            "tied": counts["tie"],
            "skipped": counts["skipped"],
            "undo": next(reversed(done), None),
            "pair": None if pair is None else self._shown(annotator, pair),
        }

    def _shown(self, annotator: str, pair: str) -> dict[str, str]:
        matchup = self._by_id[pair]
        first, second = matchup.shown(self._slots(annotator, matchup))
        return {"id": pair, "prompt": matchup.prompt, "first": first, "second": second}

    def _order(self, annotator: str) -> list[str]:
        if annotator not in self._orders:
            draws = {pair: self._draw("order", annotator, matchup) for pair, matchup in self._by_id.items()}
            self._orders[annotator] = sorted(draws, key=draws.__getitem__)
        return self._orders[annotator]

    def _slots(self, annotator: str, matchup: Matchup) -> Order:
        return "ab" if self._draw("slots", annotator, matchup)[0] % 2 else "ba"

    def _draw(self, purpose: str, annotator: str, matchup: Matchup) -> bytes:
        """Return random bytes that depend on (seed, purpose, annotator, matchup) alone."""
        drawn_for = (self.seed, purpose, annotator.casefold(), *key_of(matchup))
        return hashlib.sha256(json.dumps(drawn_for).encode()).digest()

    def _annotator(self, name: Any) -> str:
        try:
            name = checked_annotator(name)
        except ValueError as error:
            raise RequestRefused(400, str(error)) from None
        for known in self._allowed or self._done:  # names ignore case
            if known.casefold() == name.casefold():
                return known
        if self._allowed:
            raise RequestRefused(403, f"this run has no annotator {name}")
        return name

    def _load_labels(self) -> None:
        """Count the labels of the file as done. Raises DataError for those of other texts or of another question."""
        ids = {key_of(matchup): pair for pair, matchup in self._by_id.items()}
        bad = BadRows("labels")
        for label in current_labels(self._writer.labels):
            pair = ids.get(label.key)
            if pair is None:
                continue
            self._done.setdefault(label.annotator, {})[pair] = label
            where = f"{label.annotator} on prompt {label.prompt_id}"
            hashes = tuple(map(text_hash, self._by_id[pair].shown("ab")))
            if label.question != self.prompt.name:
                bad.add(f"answer to {label.question}, not to {self.prompt.name}", where)
            elif (label.hash_a, label.hash_b) != hashes:
                bad.add("label of other texts", where)
        if bad:
            raise DataError(
                f"{self._writer.path} holds other labels of the same comparisons:\n{bad.summary()}\n"
                "Choose another run_dir, or give the completions and the prompt that they were made with."
            )
