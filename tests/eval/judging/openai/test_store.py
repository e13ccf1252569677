"""The store: what is committed, what a failure is, the ledger, one process at a time, a kill between two commits."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from tiny_runs import CLEAN, ROOT

from drpo.data.records import DataError
from eval.judging.openai.store import Call, Ledger, Store, call_key


def call(key: str = "k", status: str = "ok", **changes) -> Call:
    values = dict.fromkeys(Call.__dataclass_fields__)
    known = {"key": key, "model": "m", "sample": 0, "backend": "live", "status": status, "detail": ""}
    return Call(**{**values, **known, "num_attempts": 1, "time": "now", "request": "{}", **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "verdicts.sqlite"


def test_an_answer_comes_back_as_it_was(path):
    kept = call(text="Preferred: A\n\x00é😀", cost=0.25, prompt_tokens=3, slot="first", latency=0.5)
    with closing(Store(path)) as store:
        assert store.answer("k") is None
        (number,) = store.open_requests([("k", 1.0)])
        store.settle(number, 0.25, "answered", kept)
    with closing(Store(path)) as store:
        assert store.answer("k") == kept and store.answer("l") is None
        assert store.calls() == [kept]


def test_a_failure_is_kept_but_is_no_answer(path):
    with closing(Store(path)) as store:
        store.add_call(call(status="failed"))
        store.add_call(call(status="failed"))
        assert store.answer("k") is None and len(store.calls()) == 2
        (number,) = store.open_requests([("k", 1.0)])
        store.settle(number, 0.5, "answered", call())
        assert store.answer("k") == call()


def test_a_second_answer_to_one_call_is_refused_and_books_nothing(path):
    """It would have been paid twice; the ledger and the answers change together or not at all."""
    with closing(Store(path)) as store:
        first, second = store.open_requests([("k", 1.0), ("k", 1.0)])
        store.settle(first, 0.5, "answered", call())
        with pytest.raises(Exception, match="UNIQUE"):
            store.settle(second, 0.5, "answered", call(text="other"))
        assert store.ledger() == Ledger(2, 1.5, 1, 1.0) and len(store.calls()) == 1


def test_the_ledger_counts_what_is_open_with_its_bound(path):
    with closing(Store(path)) as store:
        assert store.ledger() == Ledger(0, 0.0, 0, 0.0)
        one, two, three = store.open_requests([("a", 1.0), ("b", 2.0), ("c", 4.0)])
        assert store.ledger() == Ledger(3, 7.0, 3, 7.0)
        store.settle(two, 0.5, "answered")
        store.forget_request(three)
        store.forget_request(two)  # settled, so it stays
    with closing(Store(path)) as store:
        assert store.ledger() == Ledger(2, 1.5, 1, 1.0)


def test_a_key_is_the_content(path):
    parts = {
        "url": "u",
        "body": {"model": "m", "messages": [{"role": "user", "content": "é\ud83d"}]},
        "sample": 0,
    }
    same = {"sample": 0, "body": {"messages": parts["body"]["messages"], "model": "m"}, "url": "u"}
    assert call_key(parts) == call_key(same) and len(call_key(parts)) == 64
    assert call_key({**parts, "sample": 1}) != call_key(parts)


def test_facts_and_batches(path):
    with closing(Store(path)) as store:
        store.put_fact("form", "json")
        store.put_fact("form", {"a": [1]})
        store.add_batch("mine", [("k", 0, {"model": "m"})])
        store.add_batch("other", [])
        store.update_batch("other", "batch_0", "completed")
    with closing(Store(path)) as store:
        assert store.fact("form") == {"a": [1]} and store.fact("else") is None
        assert store.open_batches() == [("mine", None, [["k", 0, {"model": "m"}]])]


def test_one_process_at_a_time(path):
    with closing(Store(path)), pytest.raises(DataError, match="is in use by another run"):
        Store(path)
    Store(path).close()


def test_what_is_no_store_is_told(tmp_path):
    (tmp_path / "x").write_text("hello " * 1000)
    with pytest.raises(DataError, match="is not a store of verdicts"):
        Store(tmp_path / "x")


def test_what_another_version_or_program_made_is_left_alone(tmp_path):
    Store(tmp_path / "old").close()
    with sqlite3.connect(tmp_path / "old") as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(
        DataError, match="has layout 7, this version reads and writes 1; .* another file with store="
    ):
        Store(tmp_path / "old")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE cakes (name)")
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(DataError, match="is not a store of verdicts: its tables are cakes"):
        Store(tmp_path / "other")
    with sqlite3.connect(tmp_path / "other") as db:
        assert [name for (name,) in db.execute("SELECT name FROM sqlite_master")] == ["cakes"]


def test_a_place_where_no_store_can_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "s.sqlite", tmp_path / "folder"):
        with pytest.raises(DataError, match="no store of verdicts can be kept at"):
            Store(path)


KILLED = """
import os, signal, sys
from eval.judging.openai.store import Call, Store
store = Store(sys.argv[1])
values = dict.fromkeys(Call.__dataclass_fields__)
for i in range(100):
    known = {"key": str(i), "status": "ok", "text": "x" * 5000, "num_attempts": 1}
    (number,) = store.open_requests([(str(i), 1.0)])
    if i == 37:
        os.kill(os.getpid(), signal.SIGKILL)
    store.settle(number, 0.5, "answered", Call(**{**values, **known}))
"""


def test_a_killed_process_leaves_every_commit_before_the_kill(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, env=CLEAN)
    assert done.returncode == -signal.SIGKILL
    with closing(Store(path)) as store:
        assert [c.key for c in store.calls()] == [str(i) for i in range(37)]
        assert store.ledger() == Ledger(38, 37 * 0.5 + 1.0, 1, 1.0)
    assert os.path.exists(path)
