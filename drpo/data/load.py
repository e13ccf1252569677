"""Section `data` of a recipe, and its way to tokenised examples: read, view, split, truncate, encode."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drpo.config import Section, key, names_keys, refuse, refuse_changed, setting
from drpo.data.chat import ChatTemplate
from drpo.data.encode import Example, encode_prompts, encode_records
from drpo.data.files import read_table
from drpo.data.holdout import hold_out
from drpo.data.noise import NoiseConfig, add_noise
from drpo.data.records import BadRows, DataError, Record, RowError
from drpo.data.stop import template_of, with_stop_token
from drpo.data.tasks.demo import DemoConfig
from drpo.data.tasks.registry import TASKS, TaskName
from drpo.data.template_arguments import RESERVED
from drpo.data.truncation import Truncation, shorten_prompts
from drpo.data.views import View, distinct_prompts, view_name, view_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_EVAL_FRACTION = 0.05


@dataclass(frozen=True)
class DataConfig(Section):
    """What to train on (section `data` of a recipe)."""

    task: TaskName = "demo"
    """The kind of data. demo: generated; own: your data; the others are data sets, such as tldr (Reddit posts and
    summaries) and hh (Anthropic's dialogues)."""
    path: str | None = None
    """A file (.jsonl, .json, .csv, each also .gz; .parquet), a folder of files named after their splits, a
    folder that `datasets` saved, or a hub id such as trl-lib/tldr. Not for the demo."""
    subset: str | None = None
    "A folder inside `path`; on the hub a configuration (comparisons), for hh a data_dir (harmless-base)."
    train_split: str = "train"
    "The split to train on. A single file is the split train."
    eval_split: str | None = None
    "The split to evaluate on. Without it a part of the train split is held out."
    eval_fraction: float | None = setting(None, ge=0, lt=1)
    """Share of the distinct prompts to hold out by a hash of the prompt, the same ones in every stage; null
    = 0.05."""
    split_seed: int = 0
    "Seed of that hash: keep it the same for SFT, reward model and RL."
    limit: int | None = setting(None, ge=1)
    "Read only the first this many rows of each split."
    columns: dict[str, str] = field(default_factory=dict)
    """For own data: the name of your column for each of prompt, completion, chosen, rejected, messages,
    responses, scores, where it differs; for example data.columns.prompt=question."""
    chat_template: bool = False
    """Render the turns with the tokenizer's chat template; a post of tldr becomes a message that asks for its summary.
    Conversations need it. Not for the demo."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    "Arguments of the chat template, for example data.chat_template_kwargs.enable_thinking=false."
    stop_token: str | None = None
    """The token that ends a response, in training and in sampling; null = the one that ends the assistant's
    turn in the chat template, else the tokenizer's eos token."""
    max_prompt_length: int | None = setting(None, ge=1)
    "The most tokens of a prompt; null = no limit."
    max_response_length: int | None = setting(None, ge=1)
    """The most tokens of a response, stop token included; null = no limit. A longer demonstration or pair
    is a bad row; a longer response to reset to is cut, since only a prefix of it is used."""
    truncation: Truncation | None = None
    """What happens to a longer prompt. refuse: it is a bad row; left: its last tokens are kept; paragraph:
    the post loses its last paragraphs (not for every task). null = the task's own: paragraph for tldr, left for hh
    without chat template, refuse for most."""
    max_bad_fraction: float = setting(0.01, ge=0, le=1)
    "Stop when more than this share of the rows is bad."
    demo: DemoConfig = field(default_factory=DemoConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)

    def check(self) -> None:
        task, task_key = TASKS[self.task], f"{key('task')}={self.task}"
        if task.read is not None:
            refuse(not self.path, "path", f"must name the data for {task_key}, got {self.path!r}")
        refuse_changed(self, task.unused, f"does not apply to {task_key}")
        if self.eval_split is not None:
            rule = f"must differ from {key('train_split')}, got {self.eval_split!r}"
            refuse(self.eval_split == self.train_split, "eval_split", rule)
            rule = f"does not apply when {key('eval_split')} is given"
            refuse_changed(self, ("eval_fraction", "split_seed"), rule)
        if not task.columns:
            owners = " or ".join(name for name, other in TASKS.items() if other.columns)
            refuse_changed(self, ["columns"], f"applies to {key('task')}={owners} only")
        for name in self.columns:
            rule = f"is unknown; the fields are: {', '.join(task.columns)}"
            refuse(name not in task.columns, f"columns.{name}", rule)
        if not self.chat_template:
            refuse_changed(self, ["chat_template_kwargs"], f"needs {key('chat_template')}=true")
        for name in self.chat_template_kwargs:
            rule = "is not the template's own: DRPO sets it, or it would do nothing; leave it out"
            refuse(name in RESERVED, f"chat_template_kwargs.{name}", rule)
        rule = f"must not cut the opening of a chat template, got {self.truncation}"
        refuse(self.chat_template and self.truncation == "left", "truncation", rule)
        if self.truncation is not None:
            refuse(self.max_prompt_length is None, "truncation", f"needs {key('max_prompt_length')}")
            owners = " or ".join(name for name, other in TASKS.items() if other.by_paragraph)
            rule = f"can be paragraph for {key('task')}={owners} only, got {task_key}"
            refuse(self.truncation == "paragraph" and task.by_paragraph is None, "truncation", rule)

    @property
    def prompt_truncation(self) -> Truncation:
        """`truncation`, or the task's own, which never cuts the opening of a chat template."""
        default = TASKS[self.task].truncation
        return self.truncation or ("refuse" if default == "left" and self.chat_template else default)

    @property
    def held_out_split(self) -> str | None:
        """`eval_split`, or the task's own; None when a part of the train split is held out."""
        return TASKS[self.task].eval_split if self.eval_split is None else self.eval_split

    @property
    def held_out_fraction(self) -> float:
        """`eval_fraction`, or its default."""
        return DEFAULT_EVAL_FRACTION if self.eval_fraction is None else self.eval_fraction


@dataclass(frozen=True)
class Splits:
    """Examples to train on and held-out ones, and a report of the rows that were read and left out."""

    train: list[Example]
    eval: list[Example]
    report: str

    def train_digest(self) -> str:
        """Return a digest by which a run knows its data again: token ids, scores and further columns, in order."""
        digest = hashlib.sha256()
        for example in self.train:
            single = (example.query_ids, example.completion_ids, example.chosen_ids, example.rejected_ids)
            for ids in (*single, *example.ranked_ids):
                digest.update(array("q", [-1] if ids is None else [len(ids), *ids]).tobytes())
            rest = [len(example.ranked_ids), example.record.scores, dict(example.record.extra)]
            digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()


@names_keys
def load_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, view: View, held_out_only: bool = False
) -> Splits:
    """Read, split and encode the data of a recipe.

    Demonstrations and unpaired responses have `completion_ids`, pairs `chosen_ids` and `rejected_ids`, ranked rows
    `ranked_ids`, prompts (each distinct one once) those of all responses that the data has. No prompt is in both
    splits. Noise is put on the train split's pairs, after everything that cannot be used has been left out.
    `held_out_only` leaves `train` empty, and its split unread where possible. Raises DataError for missing data,
    for noise in another view, and when more than `max_bad_fraction` of the rows, or of the examples made from them,
    are bad.
    """
    if config.noise.on and view != "pairs":
        raise DataError(
            f"{key('noise')} applies to preference pairs, and this stage takes {view_name(view)}: "
            f"set {key('noise.flip_rate')} and {key('noise.off_topic_rate')} to 0"
        )
    tokenizer = with_stop_token(tokenizer, config)
    chat = template_of(config, tokenizer)
    bad, report, unit = BadRows("examples"), [], view_name(view)
    eval_split, train = config.held_out_split, []

    def read(split: str) -> list[Record]:
        records, notes = view_records(read_records(config, split, view, chat, report), view, bad)
        report.extend(notes)
        return records

    if eval_split is None or not held_out_only:
        train = read(config.train_split)
    if eval_split is not None:
        held_out = read(eval_split)
    else:
        train, held_out = hold_out(train, config.held_out_fraction, config.split_seed)
    if held_out_only:
        train = []
    num_examples = len(train) + len(held_out) + len(bad)
    eval_examples = _encode(held_out, config, tokenizer, view, bad, report)
    eval_prompts = {example.record.marked_prompt for example in eval_examples}
    examples = _encode(train, config, tokenizer, view, bad, report)
    train_examples = [example for example in examples if example.record.marked_prompt not in eval_prompts]
    bad.check(num_examples, config.max_bad_fraction)
    if len(train_examples) < len(examples):
        report.append(f"{len(examples) - len(train_examples)} {unit} left out of train: prompt held out")
    if len(bad):
        report.append(f"{len(bad)} of {num_examples} {unit} left out:\n{bad.summary()}")
    if not train_examples and not held_out_only:
        raise DataError("\n".join(["no examples are left to train on", *report]))
    if config.noise.on:
        train_examples, notes = add_noise(train_examples, config.noise)
        report += notes
    parts = {"eval": eval_examples} if held_out_only else {"train": train_examples, "eval": eval_examples}
    for name, part in parts.items():
        num_prompts = len({example.record.marked_prompt for example in part})
        report.append(f"{name}: {len(part)} {unit}, {num_prompts} distinct prompts")
    return Splits(train_examples, eval_examples, "\n".join(report))


@names_keys
def load_texts(config: DataConfig) -> list[str]:
    """Return the distinct prompt and response texts of the train split, to train a tokenizer on.

    Held-out prompts are left out.
    """
    if config.chat_template:
        raise DataError(
            f"{key('chat_template')}=true needs a tokenizer that has one: none can be trained on the data"
        )
    records = read_records(config, config.train_split, "prompts", None, [])
    if config.held_out_split is None:
        records, _ = hold_out(records, config.held_out_fraction, config.split_seed)
    texts: dict[str | None, None] = {}
    for record in records:
        fields = (record.prompt, record.completion, record.chosen, record.rejected, *record.responses)
        texts |= dict.fromkeys(fields)
    return [text for text in texts if text is not None]


@names_keys
def read_records(
    config: DataConfig, split: str, view: View, chat: ChatTemplate | None, report: list[str]
) -> list[Record]:
    """Return the records of one split.

    Raises DataError for missing data and for too many bad rows.

    Args:
        config: the data.
        split: name of the split.
        view: generated data is made for it.
        chat: renders conversations; None for texts as they are.
        report: gets lines on what was read and left out.
    """
    task = TASKS[config.task]
    if task.make is not None:
        records, notes = task.make(config, view, split)
        report += notes
        return records
    bad = BadRows()
    table = read_table(
        config.path,
        split,
        bad,
        subset=config.subset,
        subset_is_folder=task.subset_is_folder,
        limit=config.limit,
        keep=task.keep,
    )
    records, notes = task.read(table, bad, config, chat)
    bad.check(table.num_rows, config.max_bad_fraction)
    report.append(f"{table.name}: {table.num_rows} rows read, {len(bad)} bad")
    report += [bad.summary()] * bool(len(bad)) + notes
    return records


def _encode(
    records: Sequence[Record],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    view: View,
    bad: BadRows,
    report: list[str],
) -> list[Example]:
    prompts = list(dict.fromkeys(record.marked_prompt for record in records))
    queries = dict(zip(prompts, encode_prompts(tokenizer, prompts), strict=True))
    cut = TASKS[config.task].cut(config.prompt_truncation)
    shortened = shorten_prompts(queries, config.max_prompt_length, cut, tokenizer)
    new_prompts = [prompt for prompt in shortened.values() if not isinstance(prompt, RowError)]
    queries |= dict(zip(new_prompts, encode_prompts(tokenizer, new_prompts), strict=True))
    fitting = []
    for record in records:
        prompt = shortened.get(record.marked_prompt)
        if isinstance(prompt, RowError):
            bad.add(prompt.kind, record.origin, prompt.detail)
        else:
            fitting.append(record if prompt is None else record.with_prompt(prompt))
    if view == "prompts":
        fitting, notes = distinct_prompts(fitting)
        report += notes
    return encode_records(tokenizer, fitting, queries, view, bad, config.max_response_length)
