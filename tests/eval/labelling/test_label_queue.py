"""Who sees what in which order, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from label_runs import BETTER, WORSE, better_slot, matchups, queue

from drpo.data.records import DataError
from eval.labelling.label_queue import RequestRefused
from eval.labelling.labels import current_labels, read_labels


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def label_all(queue, annotator: str, choose=better_slot) -> list[dict]:
    """Label everything; the pairs in the order in which they were shown."""
    shown, state = [], queue.state(annotator)
    while state["pair"]:
        shown.append(state["pair"])
        state = queue.choose(annotator, state["pair"]["id"], choose(state["pair"]), 1)
    return shown


# --- order and slots --------------------------------------------------------------------------------------


def test_every_pair_is_shown_once_and_the_winner_is_the_system_behind_the_slot(path):
    full = queue(path)
    shown = label_all(full, "anna")
    assert sorted(pair["prompt"] for pair in shown) == [c.prompt for c in matchups()]
    labels = read_labels(path)
    assert [label.winner for label in labels] == ["a"] * 6 and {label.question for label in labels} == {
        "tldr-1"
    }
    for pair, label in zip(shown, labels, strict=True):
        assert label.order == ("ab" if better_slot(pair) == "first" else "ba")
    state = full.state("anna")
    assert (state["pair"], state["done"], state["total"], state["skipped"]) == (None, 6, 6, 0)


@pytest.mark.parametrize(
    "choice, winners", [("first", {"ab": "a", "ba": "b"}), ("second", {"ab": "b", "ba": "a"}), ("tie", None)]
)
def test_choices_by_slot(path, choice, winners):
    label_all(queue(path, matchups(30)), "anna", lambda pair: choice)
    labels = read_labels(path)
    assert {label.order for label in labels} == {"ab", "ba"}
    assert all(label.winner == (winners[label.order] if winners else "tie") for label in labels)


def test_the_order_is_the_annotators_own_and_not_the_files(tmp_path):
    def shown(name: str, annotator: str, compared, seed=0) -> list[tuple]:
        pairs = label_all(queue(tmp_path / name, compared, seed=seed), annotator)
        return [(pair["prompt"], pair["first"]) for pair in pairs]

    some = matchups(12)
    anna = shown("1", "anna", some)
    assert shown("2", "anna", some[::-1]) == anna
    assert shown("3", "Anna", some) == anna
    ben, later = shown("4", "ben", some), shown("5", "anna", some, seed=1)
    for other in (ben, later):
        assert sorted(p for p, _ in other) == sorted(p for p, _ in anna)
        assert [p for p, _ in other] != [p for p, _ in anna]
        assert dict(other) != dict(anna), "the slots are drawn anew, too"
    few = [place for place in anna if place[0] in {c.prompt for c in some[:5]}]
    assert shown("6", "anna", some[:5]) == few


def test_the_slots_are_drawn_evenly(path):
    """400 fair coins: within 5 standard deviations, for either annotator and for both being alike."""
    compared = matchups(400)
    full = queue(path, compared)
    first = {name: {p["prompt"]: better_slot(p) for p in label_all(full, name)} for name in ("anna", "ben")}
    for slots in first.values():
        assert abs(sum(slot == "first" for slot in slots.values()) - 200) < 50
    alike = sum(first["anna"][prompt] == first["ben"][prompt] for prompt in first["anna"])
    assert abs(alike - 200) < 50


def test_a_state_names_no_system(path):
    full = queue(path)
    state = full.state("anna")
    texts = json.dumps([state, full.choose("anna", state["pair"]["id"], "tie", 1)])
    assert BETTER not in texts and WORSE not in texts
    assert state["pair"]["id"] not in json.dumps(queue(path.with_name("other")).state("anna")), "drawn anew"


# --- skip, undo, resume -----------------------------------------------------------------------------------


def test_skipped_pairs_do_not_come_back_and_are_counted(path):
    full = queue(path)
    label_all(full, "anna", lambda pair: "skip" if "topic003" in pair["prompt"] else "tie")
    state = full.state("anna")
    assert (state["done"], state["skipped"], state["tied"]) == (6, 1, 5)
    assert [label.score for label in read_labels(path)].count(None) == 1


def test_undo_shows_the_pair_again_and_appends_a_row(path):
    full = queue(path)
    shown = [full.state("anna")["pair"]]
    for _ in range(2):
        shown.append(full.choose("anna", shown[-1]["id"], "first", 1)["pair"])
    state = full.undo("anna", shown[1]["id"])
    assert (state["pair"], state["done"], state["undo"]) == (shown[1], 1, shown[0]["id"])
    state = full.undo("anna", shown[0]["id"])
    assert (state["pair"], state["done"], state["undo"]) == (shown[0], 0, None)
    assert full.choose("anna", shown[0]["id"], "tie", 1)["done"] == 1
    labels = read_labels(path)
    assert [label.status for label in labels] == ["labelled"] * 2 + ["undone"] * 2 + ["labelled"]
    assert [label.winner for label in current_labels(labels)] == ["tie"]


def test_only_the_own_last_label_can_be_undone(path):
    full = queue(path)
    first = full.state("anna")["pair"]["id"]
    with pytest.raises(RequestRefused, match="nothing to undo"):
        full.undo("anna", first)
    second = full.choose("anna", first, "tie", 1)["pair"]["id"]
    full.choose("anna", second, "tie", 1)
    for pair in (first, None, 7):
        with pytest.raises(RequestRefused, match="not the last label"):
            full.undo("anna", pair)
    with pytest.raises(RequestRefused, match="nothing to undo"):
        full.undo("ben", second)
    assert len(read_labels(path)) == 2


def test_a_new_queue_goes_on_where_the_last_one_was(path):
    before = queue(path)
    state = before.state("anna")
    for choice in ("first", "skip", "second"):
        state = before.choose("anna", state["pair"]["id"], choice, 1)
    state = before.undo("anna", state["undo"])
    expected = {**state, "undo": None, "pair": {**state["pair"], "id": None}}
    before.close()
    after = queue(path)
    again = after.state("anna")
    assert {**again, "undo": None, "pair": {**again["pair"], "id": None}} == expected
    assert after.progress() == {"anna": 2}
    assert after.undo("anna", again["undo"])["skipped"] == 0, "the last one was skipped"


def test_more_prompts_keep_the_labels_there_are(path):
    before = queue(path, matchups(4))
    label_all(before, "anna")
    before.close()
    after = queue(path, matchups(6))
    assert after.state("anna")["done"] == 4
    assert {pair["prompt"] for pair in label_all(after, "anna")} == {c.prompt for c in matchups()[4:]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response_a": " topic000 is LATE"}, "1 x label of other texts"),
        ({"response_b": "other"}, "1 x label of other texts"),
    ],
)
def test_labels_of_other_texts_are_refused(path, change, message):
    before = queue(path)
    label_all(before, "anna")
    before.close()
    first, *others = matchups()
    with pytest.raises(DataError, match=message):
        queue(path, [replace(first, **change), *others])


def test_labels_of_another_question_are_refused(path):
    before = queue(path)
    label_all(before, "anna")
    before.close()
    lines = path.read_text().replace("tldr-1", "hh_helpful-1")
    path.write_text(lines)
    with pytest.raises(DataError, match="6 x answer to hh_helpful-1, not to tldr-1"):
        queue(path)


# --- what is refused --------------------------------------------------------------------------------------


def test_what_is_refused_stores_nothing(path):
    full = queue(path, ties=False, annotators=["anna"])
    pair = full.state("anna")["pair"]["id"]
    for code, arguments in (
        (400, ("", pair, "first", 1)),
        (400, (None, pair, "first", 1)),
        (403, ("ben", pair, "first", 1)),
        (404, ("anna", "no such pair", "first", 1)),
        (404, ("anna", ["a"], "first", 1)),
        (400, ("anna", pair, "third", 1)),
        (400, ("anna", pair, ["first"], 1)),
        (400, ("anna", pair, "tie", 1)),
        (400, ("anna", pair, "first", "1")),
        (400, ("anna", pair, "first", True)),
        (400, ("anna", pair, "first", -1)),
        (400, ("anna", pair, "first", math.nan)),
        (400, ("anna", pair, "first", 10**400)),
    ):
        with pytest.raises(RequestRefused) as refused:
            full.choose(*arguments)
        assert refused.value.code == code, arguments
    assert full.state("anna")["done"] == 0 and path.read_bytes() == b""
    full.choose("anna", pair, "first", 1)
    with pytest.raises(RequestRefused, match="labelled already"):
        full.choose("anna", pair, "second", 1)
    assert len(read_labels(path)) == 1


def test_a_name_in_other_letters_is_the_same_person(path):
    full = queue(path)
    pair = full.state("Anna")["pair"]
    full.choose("Anna", pair["id"], better_slot(pair), 1)
    assert full.state("ANNA")["done"] == 1 and full.state("ANNA")["annotator"] == "Anna"
    assert full.state("anna b")["done"] == 0
    with pytest.raises(RequestRefused, match="labelled already"):
        full.choose("anna", pair["id"], "tie", 1)
