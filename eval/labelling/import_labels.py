"""Import labels from data: pairs of responses of which a person chose one, as completions and labels.

    prompt with pairs 0, 1, ...:   system text_1 with seed i: one response of pair i,   text_2: the other one

The hashes of the two responses decide which is text_1 and the number of the pair. So both are independent of the
order of the data and of the label, and a pair labelled by several people is one matchup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from drpo.config import Section, key, refuse, refuse_changed, save_resolved
from drpo.data.load import DataConfig, read_records
from drpo.data.records import BadRows, DataError, Record, RowError
from drpo.data.tasks.registry import TASKS
from drpo.data.views import view_records
from eval.completions.rows import CompletionRow, CompletionsWriter, prompt_id_of
from eval.judging.matchup import Matchup
from eval.labelling.labels import (
    Label,
    LabelsWriter,
    annotator_of_row,
    current_labels,
    label_of,
    number_of_row,
    text_hash,
)
from eval.progress import Say

SYSTEMS = ("text_1", "text_2")
UNKNOWN = "data"
"Annotator of labels without one."
APPLIES = ("task", "path", "subset", "limit", "columns", "max_bad_fraction", "demo")
"Keys of `data` that apply to labels."


@dataclass(frozen=True)
class ImportLabelsRecipe(Section):
    """Pairs of which people chose one response."""

    run_dir: str = "runs/import_labels"
    """Folder of the results."""
    split: str = "train"
    """The split of the data; a single file is the split train, and the demo has train and eval."""
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        names = [field.name for field in fields(DataConfig) if field.name not in APPLIES]
        refuse_changed(self.data, names, "does not apply to labels: they are of whole texts", "data.")
        eval_split = TASKS[self.data.task].eval_split
        rule = f"must be train or {eval_split} for {key('data.task')}={self.data.task}, got {self.split}"
        refuse(eval_split is not None and self.split not in ("train", eval_split), "split", rule)


def import_labels(recipe: ImportLabelsRecipe, say: Say = print) -> Path:
    """Read the pairs, and write them as completions and labels. Returns the path of labels.jsonl."""
    folder, config = Path(recipe.run_dir), recipe.data
    completions_path, labels_path = folder / "completions.jsonl", folder / "labels.jsonl"
    for path in (completions_path, labels_path):
        if path.exists():
            raise DataError(f"{path} is there already; choose another run_dir or remove it")
    report: list[str] = []
    bad = BadRows()
    records = read_records(config, recipe.split, "pairs", None, report)
    records, notes = view_records(records, "pairs", bad)
    rows, labels, counts = labels_from_pairs(records, bad)
    bad.check(len(records), config.max_bad_fraction)
    if bad:
        report.append(f"{len(bad)} pairs left out:\n{bad.summary()}")
    say("\n".join([*report, *notes, *counts]))
    if not labels:
        raise DataError("no labelled pairs are left")
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    CompletionsWriter(completions_path, {"data": config.path or config.task}).write(rows)
    with LabelsWriter(labels_path) as writer:
        writer.append(labels)
    return labels_path


def labels_from_pairs(
    records: Sequence[Record], bad: BadRows
) -> tuple[list[CompletionRow], list[Label], list[str]]:
    """Return completions of the systems text_1 and text_2, the labels on them, and notes on the annotators.

    A record has `chosen` and `rejected`; `extra` may have `worker`, and `confidence` in itself or in its own `extra`
    (openai/summarize_from_feedback). The order of presentation is unknown. Records with an annotator's name or a
    confidence of a wrong type are added to `bad`.
    """
    pairs: dict[str, dict[tuple[str, str], list[tuple[str, str, float | None]]]] = {}
    for record in records:
        nested = record.extra.get("extra")
        confidence = nested.get("confidence") if isinstance(nested, dict) else None
        worker = record.extra.get("worker")
        try:
            annotator = UNKNOWN if worker is None else annotator_of_row(worker)
            confidence = number_of_row(record.extra.get("confidence", confidence), "confidence")
        except RowError as error:
            bad.add(error.kind, record.origin, error.detail)
            continue
        texts = tuple(sorted((record.chosen, record.rejected), key=text_hash))
        verdicts = pairs.setdefault(record.prompt, {}).setdefault(texts, [])
        verdicts.append((annotator, "a" if record.chosen == texts[0] else "b", confidence))
    rows, labels = [], []
    for prompt, by_texts in pairs.items():
        for seed, texts in enumerate(sorted(by_texts, key=lambda texts: [text_hash(text) for text in texts])):
            matchup = Matchup(prompt_id_of(prompt), prompt, SYSTEMS[0], texts[0], SYSTEMS[1], texts[1], seed)
            rows += [
                CompletionRow(system, matchup.prompt_id, prompt, text, True, None, seed)
                for system, text in zip(SYSTEMS, texts, strict=True)
            ]
            labels += [
                label_of(matchup, annotator, "labelled", winner, None, confidence=confidence)
                for annotator, winner, confidence in by_texts[texts]
            ]
    current = current_labels(labels)
    num_labels = Counter(label.key for label in current)
    counts = {
        "labels": len(labels),
        "annotators": len({label.annotator for label in labels}),
        "prompts": len(pairs),
        "pairs": len(num_labels),
        "pairs with labels by several annotators": sum(num > 1 for num in num_labels.values()),
    }
    notes = [", ".join(f"{name}: {count}" for name, count in counts.items())]
    if num_replaced := len(labels) - len(current):
        notes.append(f"an annotator's second labels of a pair, of which the last one counts: {num_replaced}")
    return rows, labels, notes
