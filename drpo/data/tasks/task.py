"""A task: one kind of data, with all that the rest of the code needs to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo.data.chat import ChatTemplate
from drpo.data.encode import truncate_left
from drpo.data.files import Table, keep_all
from drpo.data.records import BadRows, Record
from drpo.data.truncation import Cut, Truncation
from drpo.data.views import View

if TYPE_CHECKING:
    from drpo.data.load import DataConfig

Records = tuple[list[Record], list[str]]
"Records, and notes for the report."
Reader = Callable[[Table, BadRows, "DataConfig", ChatTemplate | None], Records]
Maker = Callable[["DataConfig", View, str], Records]


@dataclass(frozen=True)
class Task:
    """One kind of data: the value of `data.task` with its rules; it reads rows or makes its records."""

    name: str
    read: Reader | None = None
    "Convert the rows of one split, with a chat template or without; bad rows are added to BadRows."
    make: Maker | None = None
    "Generate the records of one split for a view, in place of `read`."
    eval_split: str | None = None
    "The held-out split of generated data; None: that of data.eval_split, or a part of the train split."
    unused: tuple[str, ...] = ("demo",)
    "Keys of section `data` that do not apply."
    columns: tuple[str, ...] = ()
    "Fields whose column data.columns can name; empty: data.columns does not apply."
    keep: Callable[[str], bool] = keep_all
    "Whether to read a column."
    subset_is_folder: bool = False
    "Whether data.subset is a data_dir on the hub, and not a configuration."
    truncation: Truncation = "refuse"
    "Default of data.truncation; left becomes refuse with a chat template, whose opening it would cut."
    by_paragraph: Cut | None = None
    "How data.truncation=paragraph shortens a prompt; None: it does not apply."

    def cut(self, truncation: Truncation) -> Cut | None:
        """Return the function that shortens a long prompt; None for a truncation that refuses it."""
        return {"refuse": None, "left": truncate_left, "paragraph": self.by_paragraph}[truncation]
