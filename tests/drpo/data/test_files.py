from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from drpo.data.files import read_table
from drpo.data.records import BadRows, DataError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "ü\u2028x", "n": 3}]


def read(path, split="train", **options):
    bad = BadRows()
    return read_table(str(path), split, bad, **options), bad


def values(table):
    return [row.values for row in table.rows]


def as_json_lines(rows, newline="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + newline for row in rows)


# --- formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines_with_any_line_ending_and_mark(tmp_path, newline, bom, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(bom + as_json_lines(ROWS, newline).encode())
    table, bad = read(path)
    assert values(table) == ROWS
    assert [row.origin for row in table.rows] == [f"rows{suffix}:1", f"rows{suffix}:2", f"rows{suffix}:3"]
    assert table.columns == ("prompt", "n")
    assert (table.num_rows, len(bad)) == (3, 0)


def test_gzipped_json_lines_without_a_last_newline_and_with_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    text = "\n" + as_json_lines(ROWS).replace("\n", "\n\n").rstrip("\n")
    path.write_bytes(gzip.compress(text.encode()))
    table, _ = read(path)
    assert values(table) == ROWS
    assert [row.origin for row in table.rows] == ["rows.jsonl.gz:2", "rows.jsonl.gz:4", "rows.jsonl.gz:6"]


@pytest.mark.parametrize("nonsense", ["[" * 100_000, "1" * 5000], ids=["nested", "long number"])
def test_json_that_python_cannot_take_is_a_bad_row_or_a_bad_file(tmp_path, nonsense):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"a": 1}\n{"a": ' + nonsense + "}\n")
    bad = BadRows()
    assert len(list(read_table(str(lines), "train", bad).rows)) == 1 and len(bad) == 1
    array = tmp_path / "rows.json"
    array.write_text(f"[{nonsense}]")
    with pytest.raises(DataError, match="is not valid JSON"):
        list(read_table(str(array), "train", BadRows()).rows)


def test_a_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    table, _ = read(path)
    assert values(table) == ROWS
    assert table.rows[1].origin == "rows.json:2"


def test_csv_with_quotes_newlines_and_empty_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,n\r\n"a\nb, ""c""",1\r\n\r\nd,\r\ne\r\n')
    table, bad = read(path)
    assert values(table) == [{"prompt": 'a\nb, "c"', "n": "1"}, {"prompt": "d", "n": None}]
    assert [row.origin for row in table.rows] == ["rows.csv:2", "rows.csv:5"]
    assert bad.counts == {"wrong number of cells": 1}
    assert "rows.csv:6" in bad.summary()


def test_parquet_counts_rows_across_row_groups(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [{"prompt": str(i), "turns": [{"role": "user", "content": "x"}]} for i in range(2500)]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    table, _ = read(tmp_path / "rows.parquet")
    assert values(table) == rows
    assert [row.origin for row in table.rows] == [f"rows.parquet:{i}" for i in range(1, 2501)]


def test_saved_datasets(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    table, _ = read(tmp_path / "one")
    assert values(table) == ROWS
    assert table.rows[2].origin == "one:3"

    DatasetDict(train=Dataset.from_list(ROWS[:1]), test=Dataset.from_list(ROWS[1:])).save_to_disk(
        tmp_path / "two"
    )
    table, _ = read(tmp_path / "two", "test")
    assert values(table) == ROWS[1:]
    with pytest.raises(DataError, match="no split 'valid'.* test, train"):
        read(tmp_path / "two", "valid")
    with pytest.raises(DataError, match="no split 'test'"):
        read(tmp_path / "one", "test")


# --- folders --------------------------------------------------------------------------------------------


def test_a_folder_of_splits_shards_and_subsets(tmp_path):
    folder = tmp_path / "hh" / "harmless"
    (folder / "data").mkdir(parents=True)
    (folder / "train-00000-of-00002.jsonl").write_text(as_json_lines(ROWS[:1]), encoding="utf-8")
    (folder / "train-00001-of-00002.jsonl").write_text(as_json_lines(ROWS[1:]), encoding="utf-8")
    (folder / "data" / "test.jsonl.gz").write_bytes(gzip.compress(as_json_lines(ROWS[:2]).encode()))
    (folder / "README.md").write_text("not data")
    table, _ = read(tmp_path / "hh", subset="harmless")
    assert values(table) == ROWS
    assert [row.origin for row in table.rows][1] == "train-00001-of-00002.jsonl:1"
    table, _ = read(folder, "test")
    assert values(table) == ROWS[:2]
    with pytest.raises(DataError, match="no split 'valid'.* test, train"):
        read(folder, "valid")
    with pytest.raises(DataError, match="no subset 'helpful'.* harmless"):
        read(tmp_path / "hh", subset="helpful")


def test_a_folder_without_data_names_its_entries(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no data files.*notes.txt"):
        read(tmp_path)


def test_a_file_has_one_split_and_no_subset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(as_json_lines(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match="no split 'test'"):
        read(path, "test")
    with pytest.raises(DataError, match="subset=axis does not apply"):
        read(path, subset="axis")


@pytest.mark.parametrize("name", ["other.jsonl", "missing/deeper.jsonl", "missing/deeper.parquet"])
def test_a_missing_file_names_the_files_that_are_there(tmp_path, name):
    (tmp_path / "axis.jsonl").write_text(as_json_lines(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match=r"no file or folder .*holds: axis\.jsonl"):
        read(tmp_path / name)


def test_an_unknown_format_names_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"rows\.xlsx.*\.jsonl.*\.parquet"):
        read(tmp_path / "rows.xlsx")


# --- damage ---------------------------------------------------------------------------------------------


def test_bad_lines_are_counted_with_their_place_and_the_others_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": \n["b"]\n{"prompt": "\xff"}\n{"prompt": "c"}\n')
    table, bad = read(path)
    assert values(table) == [{"prompt": "a"}, {"prompt": "c"}]
    assert bad.counts == {"invalid JSON": 1, "wrong type": 1, "not UTF-8": 1}
    assert table.num_rows == len(table.rows) + len(bad)
    for line in (2, 3, 4):
        assert f"rows.jsonl:{line}" in bad.summary()


@pytest.mark.parametrize(
    ("name", "text"), [("rows.json", '[{"a": "b"},\n{"a": "é"}]'), ("rows.csv", "a\né\n")]
)
def test_an_array_or_csv_that_is_not_utf8_is_refused_by_line(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}:2 is not UTF-8"):
        read_table(str(tmp_path / name), "train", BadRows())


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_truncated_archive_is_an_error_that_says_where(tmp_path, keep):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("".join(f'{{"prompt": "{i * i * 7919}"}}\n' for i in range(5000)).encode())
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz is cut off or damaged after line \d+"):
        read(path)


def test_a_file_that_is_no_archive_in_spite_of_its_name(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_text(as_json_lines(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match="damaged after line 0"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} holds no rows"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"prompt": 1},', "not valid JSON: .*line 1"),
        ("a.csv", 'prompt,n\n"a,1\n', r"a\.csv:\d+ is not valid CSV"),
        ("a.csv", "prompt,prompt\na,b\n", "names a column twice"),
        ("a.parquet", "PAR1 but no more", "not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


# --- options --------------------------------------------------------------------------------------------


def test_limit_stops_reading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(as_json_lines(ROWS[:2]) + "not json\n", encoding="utf-8")
    table, bad = read(path, limit=2)
    assert values(table) == ROWS[:2]
    assert (table.num_rows, len(bad)) == (2, 0)


def test_columns_that_are_not_kept_are_not_in_the_rows(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text(as_json_lines(ROWS), encoding="utf-8")
    for path in (tmp_path / "saved", tmp_path / "rows.jsonl"):
        table, _ = read(path, keep=lambda column: column != "n")
        assert values(table) == [{"prompt": row["prompt"]} for row in ROWS]


# --- hub (`datasets` stands in for the hub) -------------------------------------------------------------


def test_the_hub_is_asked_for_configurations_or_folders(monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    table, _ = read("openai/nowhere", "validation", subset="axis")
    assert table.rows[2].origin == "openai/nowhere/validation:3"
    read("Anthropic/nowhere", subset="harmless-base", subset_is_folder=True)
    assert calls == [
        ("openai/nowhere", {"split": "validation", "name": "axis"}),
        ("Anthropic/nowhere", {"split": "train", "data_dir": "harmless-base"}),
    ]


def test_a_repository_with_a_loading_script_is_read_from_its_parquet_branch(monkeypatch):
    def load_dataset(path, *, split, name=None, data_dir=None, revision=None):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found nowhere.py")
        assert (data_dir, name, split) == ("comparisons", None, "train")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert values(read("openai/nowhere", subset="comparisons")[0]) == ROWS


def test_a_failing_hub_says_what_was_asked_and_what_is_there(monkeypatch, tmp_path):
    def load_dataset(path, **options):
        raise ValueError('Unknown split "valid". Should be one of ["train", "test"].')

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(DataError) as error:
        read("some/where", "valid")
    message = str(error.value)
    assert "some/where (subset=null, split valid)" in message
    assert '["train", "test"]' in message
    assert "mine.jsonl" in message
