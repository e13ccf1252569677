"""Labelled texts for a probe: own files, or the demo's references with and without a fault."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.encode import encode_queries, encode_responses
from drpo.data.files import Row, convert_rows, read_table
from drpo.data.holdout import is_held_out
from drpo.data.records import BadRows, DataError, RowError, require_text
from drpo.data.tasks.demo import DemoConfig, make_demo
from drpo.data.tasks.demo_errors import make_faulty_summaries

NUM_DEMO_POSTS = 1024
APPLIES_TO = {
    "fault": ("demo",),
    "path": ("texts", "file"),
    **dict.fromkeys(("split", "text_column", "label_column"), ("texts",)),
    **dict.fromkeys(("max_length", "l2", "holdout"), ("demo", "texts")),
}
LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class ProbeConfig(Section):
    """The probe direction (section `probe` of a recipe)."""

    source: Literal["demo", "texts", "file"] = "demo"
    """demo: fitted on the demo's references (false) and the same with one fault (true); texts: fitted on own texts
    with labels; file: a finished vector."""
    fault: Literal["incomplete", "wrong_item", "wrong_order"] = "incomplete"
    """For the demo: what is wrong with the faulty summaries (drpo/data/tasks/demo_errors.py)."""
    path: str | None = None
    """For texts: a file or hub id as in data.path, with columns text and label (true/false or 1/0), and maybe prompt:
    what stands before the text and is read, but not pooled. For file: an .npz with weight (and bias) as this script
    leaves it, or .npy or .pt with one vector."""
    split: str = "train"
    """For texts: the split of `path` that holds them; a single file is the split train."""
    text_column: str = "text"
    """For texts: the name of the column text."""
    label_column: str = "label"
    """For texts: the name of the column label."""
    max_length: int | None = setting(None, ge=1)
    """The most tokens of prompt and text together; a longer row is a bad row. null = no limit."""
    l2: float = setting(1.0, gt=0)
    """Strength of the penalty l2/2 |w|^2 relative to the loss summed over the texts (1 / C of scikit-learn)."""
    holdout: float = setting(0.2, gt=0, lt=1)
    """Share of the distinct prompts (or texts without one) on which the probe is tested, not fitted."""

    def check(self) -> None:
        source = f"{key('source')}={self.source}"
        if self.source != "demo":
            refuse(not self.path, "path", f"must name the file of {source}, got {self.path!r}")
        names = [name for name, sources in APPLIES_TO.items() if self.source not in sources]
        refuse_changed(self, names, f"does not apply to {source}")


@dataclass(frozen=True, slots=True)
class ProbeText:
    """A text with its label; `prompt` precedes it and may be empty."""

    text: str
    label: bool
    prompt: str
    origin: str


@dataclass(frozen=True)
class EncodedTexts:
    """Texts as token ids, their labels, and which of them are held out."""

    context_ids: list[list[int]]
    text_ids: list[list[int]]
    labels: list[bool]
    held_out: list[bool]
    report: str


def load_probe_texts(
    config: ProbeConfig, demo: DemoConfig, tokenizer, max_bad_fraction: float
) -> EncodedTexts:
    """Read, encode and split the texts of a recipe.

    Raises DataError when they are missing, when more than `max_bad_fraction` of the rows are bad, or when the fitted
    or the held-out part lacks a label.
    """
    bad = BadRows()
    if config.source == "demo":
        texts = demo_texts(demo, config.fault)
        num_rows, name = len(texts), "demo"
    else:
        table = read_table(config.path, config.split, bad)
        known = ", ".join(table.columns)
        for option in ("text_column", "label_column"):
            column = getattr(config, option)
            if column not in table.columns:
                raise DataError(
                    f"no column {column!r} (probe.{option}) in {table.name}; its columns are: {known}"
                )
        texts = convert_rows(table, bad, lambda row: _text_of(row, config))
        num_rows, name = table.num_rows, table.name
    usable = []
    for text, context_ids, text_ids in zip(texts, *_encode(tokenizer, texts), strict=True):
        length = len(context_ids) + len(text_ids)
        if config.max_length is not None and length > config.max_length:
            bad.add("text too long", text.origin, f"{length} tokens, probe.max_length={config.max_length}")
        elif not text_ids:
            bad.add("empty text", text.origin, "no token")
        else:
            usable.append((text, context_ids, text_ids))
    bad.check(num_rows, max_bad_fraction, "data.max_bad_fraction")
    held_out = [is_held_out(text.prompt or text.text, config.holdout, 0) for text, _, _ in usable]
    labels = [text.label for text, _, _ in usable]
    report = [f"probe texts of {name}: {num_rows} rows read, {len(bad)} bad"]
    if bad:
        report.append(bad.summary())
    for part, is_test in (("fitted on", False), ("tested on", True)):
        labels_of_part = [label for label, test in zip(labels, held_out, strict=True) if test == is_test]
        report.append(f"{part} {len(labels_of_part)} texts, {sum(labels_of_part)} of them true")
        if len(set(labels_of_part)) < 2:
            raise DataError("\n".join([f"a probe is {part} texts of both labels", *report]))
    context_ids, text_ids = [ids for _, ids, _ in usable], [ids for _, _, ids in usable]
    return EncodedTexts(context_ids, text_ids, labels, held_out, "\n".join(report))


def demo_texts(config: DemoConfig, fault: str) -> list[ProbeText]:
    """Make demo references (false) and the same with one fault (true), on held-out posts after the first `num_eval`.

    So no text is about a post of the demo's evaluation.
    """
    config_for_texts = replace(config, num_eval=config.num_eval + NUM_DEMO_POSTS)
    evaluated = {record.prompt for record in make_demo(config, "prompts", "eval")}
    texts = []
    for summary in make_faulty_summaries(config_for_texts):
        record = summary.record
        if summary.kind == fault and record.prompt not in evaluated:
            texts.append(ProbeText(record.completion, False, record.prompt, record.origin))
            texts.append(ProbeText(summary.response, True, record.prompt, record.origin))
    return texts


def _text_of(row: Row, config: ProbeConfig) -> ProbeText:
    text = require_text(row.values.get(config.text_column), config.text_column)
    value = row.values.get(config.label_column)
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise RowError("wrong type", f"{config.label_column} is {value!r}, not true or false")
    prompt = row.values.get("prompt")
    return ProbeText(text, label, "" if prompt is None else require_text(prompt, "prompt"), row.origin)


def _encode(tokenizer, texts: list[ProbeText]) -> tuple[list[list[int]], list[list[int]]]:
    """Encode each text, and its context: a prompt, or a BOS token if the tokenizer adds one."""
    context_ids = encode_queries(tokenizer, [text.prompt for text in texts])
    alone = encode_queries(tokenizer, [text.text for text in texts])
    continuing = encode_responses(tokenizer, [text.text for text in texts])
    text_ids = [
        response[:-1] if text.prompt else query[len(context) :]
        for text, context, query, response in zip(texts, context_ids, alone, continuing, strict=True)
    ]
    return context_ids, text_ids
