"""Read rows from local files, saved `datasets` folders and the hub, each with its origin."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from drpo.config import key
from drpo.data.records import BadRows, DataError, RowError

Item = TypeVar("Item")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
SPLIT_FILE = re.compile(r"(?P<split>.+?)(-\d+-of-\d+)?(\.jsonl|\.json|\.csv|\.parquet)(\.gz)?")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NUM_LISTED = 20
BOM = b"\xef\xbb\xbf"
SCRIPT_REFUSED = "scripts are no longer supported"
PARQUET_BRANCH = "refs/convert/parquet"
"Where the hub keeps the data of a repository whose loading script `datasets` no longer runs."

RawRow = tuple[int, Any]
"Number of a row, and its value or the RowError in place of it."


class Row(NamedTuple):
    """The columns of one row, and its origin: "axis.jsonl:17".

    CSV and JSON lines count lines, other formats rows.
    """

    values: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Table:
    """The rows of one split; `num_rows` counts the unreadable ones too."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    num_rows: int


def keep_all(column: str) -> bool:
    """Keep every column."""
    return True


def read_table(
    path: str,
    split: str,
    bad: BadRows,
    *,
    subset: str | None = None,
    subset_is_folder: bool = False,
    limit: int | None = None,
    keep: Callable[[str], bool] = keep_all,
) -> Table:
    """Read one split of a file, a folder of files, a saved `datasets` folder or a hub dataset.

    Raises DataError, naming what is there, for a missing file, subset or split, an empty or damaged file.

    Args:
        path: a file, which has one split, "train"; a folder, whose files are the splits (train.jsonl, test.parquet,
            train-00000-of-00002.parquet); or a hub id.
        split: name of the split.
        bad: gets the rows that cannot be read: invalid JSON, not UTF-8, wrong type, wrong number of cells.
        subset: a folder inside `path`; on the hub a configuration.
        subset_is_folder: on the hub, `subset` is a `data_dir`.
        limit: number of rows to read; None for all.
        keep: whether to read a column.
    """
    local = Path(path).expanduser()
    if local.exists():
        name, raw_rows = _local(local, split, subset, keep)
    elif HUB_ID.fullmatch(path) and not path.endswith(SUFFIXES):
        dataset = _load_hub(path, split, subset, subset_is_folder)
        name, raw_rows = _from_dataset(f"{path}/{split}", dataset, keep)
    else:
        raise DataError(_nothing_at(local))

    rows: list[Row] = []
    columns: dict[str, None] = {}
    num_rows = 0
    for source, number, value in islice(raw_rows, limit):
        num_rows += 1
        origin = f"{source}:{number}"
        if isinstance(value, RowError):
            bad.add(value.kind, origin, value.detail)
        elif not isinstance(value, dict):
            bad.add("wrong type", origin, f"the row is {type(value).__name__}, not an object with fields")
        else:
            columns |= dict.fromkeys(value)
            rows.append(Row({key: item for key, item in value.items() if keep(key)}, origin))
    if num_rows == 0:
        raise DataError(f"{name} holds no rows")
    return Table(name, tuple(columns), rows, num_rows)


def convert_rows(table: Table, bad: BadRows, to_record: Callable[[Row], Item]) -> list[Item]:
    """Convert the rows of a table to records; rows for which `to_record` raises RowError are added to `bad`."""
    records = []
    for row in table.rows:
        with bad.skipping(row.origin):
            records.append(to_record(row))
    return records


# --- local ----------------------------------------------------------------------------------------------


def _local(path: Path, split: str, subset: str | None, keep: Callable[[str], bool]):
    if path.is_file():
        _only_train(path, split, subset)
        return path.name, _read_files([path], keep)
    if subset is not None:
        folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if subset not in folders:
            raise DataError(f"no {key('subset')} {subset!r} in {path}; its folders are: {_listing(folders)}")
        path = path / subset
    if (path / "dataset_dict.json").is_file():
        return _from_dataset(f"{path.name}/{split}", _saved(path, split), keep)
    if (path / "state.json").is_file():
        _only_train(path, split, None)
        return _from_dataset(path.name, _saved(path, None), keep)
    splits: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*"), *path.glob("data/*")]):
        match = SPLIT_FILE.fullmatch(file.name)
        if match and file.is_file():
            splits.setdefault(match["split"], []).append(file)
    if not splits:
        raise DataError(f"no data files ({', '.join(SUFFIXES)}) in {path}, which holds: {entries(path)}")
    if split not in splits:
        raise DataError(f"no split {split!r} in {path}; its files make the splits: {_listing(splits)}")
    return f"{path.name}/{split}", _read_files(splits[split], keep)


def _only_train(path: Path, split: str, subset: str | None) -> None:
    if subset is not None:
        raise DataError(f"{key('subset')}={subset} does not apply: {path} is a single file")
    if split != "train":
        raise DataError(
            f"no split {split!r}: {path} is a single split, 'train'. Give a folder of files named after "
            f"their splits, or hold out a part with {key('eval_fraction')}"
        )


def _read_files(files: list[Path], keep: Callable[[str], bool]) -> Iterator[tuple[str, int, Any]]:
    for file in files:
        plain_name = file.name.removesuffix(".gz")
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file} is of no known format; the formats are: {', '.join(SUFFIXES)}")
        if plain_name.endswith(".parquet"):
            numbered_rows = _parquet(file, keep)
        elif plain_name.endswith(".csv"):
            numbered_rows = _csv(file)
        elif plain_name.endswith(".json") and _starts_with_bracket(file):
            numbered_rows = _json_array(file)
        else:
            numbered_rows = _json_lines(file)
        for number, value in numbered_rows:
            yield file.name, number, value


def _byte_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers; only "\\n" ends a line. DataError, with the place, for a damaged archive."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix(BOM) if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file} is cut off or damaged after line {number} ({error}); copy it again"
        ) from None


def _text_lines(file: Path) -> Iterator[str]:
    for number, line in _byte_lines(file):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number} is not UTF-8: {error}") from None


def _json_lines(file: Path) -> Iterator[RawRow]:
    for number, line in _byte_lines(file):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield number, RowError("not UTF-8", str(error))
        except json.JSONDecodeError as error:
            yield number, RowError("invalid JSON", f"{error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
            yield number, RowError("invalid JSON", str(error))


def _starts_with_bracket(file: Path) -> bool:
    return next((line.strip() for _, line in _byte_lines(file) if line.strip()), b"").startswith(b"[")


def _json_array(file: Path) -> Iterator[RawRow]:
    content = "".join(_text_lines(file))
    try:
        yield from enumerate(json.loads(content), start=1)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None


def _csv(file: Path) -> Iterator[RawRow]:
    """Yield rows; an empty cell is a missing value, a row over several lines has the number of its first."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(_text_lines(file), strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
        if len(set(header)) < len(header):
            raise DataError(f"{file} names a column twice: {', '.join(header)}")
        last_line = reader.line_num
        for cells in reader:
            number, last_line = last_line + 1, reader.line_num
            if len(cells) == len(header):
                yield number, dict(zip(header, (cell or None for cell in cells), strict=True))
            elif cells:
                yield number, RowError("wrong number of cells", f"{len(cells)}, the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num} is not valid CSV: {error}") from None


def _parquet(file: Path, keep: Callable[[str], bool]) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            columns = [column for column in parquet.schema_arrow.names if keep(column)]
            batches = parquet.iter_batches(batch_size=1024, columns=columns)
            yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file: {error}") from None


# --- datasets -------------------------------------------------------------------------------------------


def _saved(path: Path, split: str | None):
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path} looks like a saved dataset but cannot be loaded: {error}") from error
    if split is None:
        return dataset
    if split not in dataset:
        raise DataError(f"no split {split!r} in {path}; its splits are: {_listing(dataset)}")
    return dataset[split]


def _load_hub(path: str, split: str, subset: str | None, subset_is_folder: bool):
    from datasets import load_dataset

    where = {"data_dir" if subset_is_folder else "name": subset}
    try:
        try:
            return load_dataset(path, split=split, **where)
        except RuntimeError as error:
            if SCRIPT_REFUSED not in str(error):
                raise
            return load_dataset(path, data_dir=subset, split=split, revision=PARQUET_BRANCH)
    except Exception as error:
        source = f"{path} ({key('subset')}={subset or 'null'}, split {split})"
        raise DataError(f"cannot load {source} from the hub: {error}\n{_nothing_at(Path(path))}") from error


def _from_dataset(name: str, dataset, keep: Callable[[str], bool]):
    dataset = dataset.select_columns([column for column in dataset.column_names if keep(column)])
    return name, ((name, number, values) for number, values in enumerate(dataset, start=1))


# --- folders --------------------------------------------------------------------------------------------


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f", ... ({len(names) - NUM_LISTED} more)" if len(names) > NUM_LISTED else ""
    return (", ".join(names[:NUM_LISTED]) + rest) or "none"


def entries(folder: Path) -> str:
    """List the first entries of a folder, for an error."""
    names = [entry.name + "/" * entry.is_dir() for entry in folder.iterdir()]
    return _listing(names) if names else "nothing"


def _nothing_at(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("."))
    return f"no file or folder {path}; {folder}/ holds: {entries(folder)}"
