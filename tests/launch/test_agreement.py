"""launch/agreement.py: figures worked out by hand, what was left out, and the demo from end to end."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from label_runs import BETTER, WORSE, matchups

from drpo.config import ConfigError, load_recipe
from drpo.data.records import DataError
from drpo.data.tasks.demo import true_reward
from eval.judging.judge_systems import JudgeRecipe
from eval.judging.judge_systems import judge as run_judge
from eval.judging.judgments import write_judgments
from eval.judging.openai.pairwise import PROMPTS
from eval.judging.verdict import Verdict
from eval.labelling.agreement import AgreementRecipe
from eval.labelling.agreement import agreement as run
from eval.labelling.label import LabelRecipe, matchups_to_label
from eval.labelling.label_agreement import rater_habits
from eval.labelling.label_queue import LabelQueue
from eval.labelling.labels import LabelsWriter, label_of
from eval.labelling.ratings import side_by_side
from launch.command_line import find_recipe
from launch.demo_inputs import make_demo_inputs

COMPARED = matchups(10)
NAMES = {"a": "a", "b": "b", "t": "tie", "s": None}
JUDGE, ANNA, BEN = "aaaaabbbbt", "aaabbbbbat", "aabb"


def write_judge(path: str, winners: str, name: str = "judge", prompt: str | None = "tldr-1") -> str:
    """A judge that says the same in both orders; "-" refuses."""
    verdicts = [
        Verdict(
            *(c.prompt_id, c.system_a, c.system_b, c.seed, order),
            *("refused" if w == "-" else "ok", None if w == "-" else NAMES[w]),
            *(len(c.response_a), len(c.response_b)),
        )
        for c, w in zip(COMPARED, winners, strict=False)
        for order in ("ab", "ba")
    ]
    write_judgments(Path(path), verdicts, [], {"judge": name, "prompt_name": prompt, "orders": "both"})
    return path


def write_labels(path: str, **said: str) -> str:
    """What each annotator says, "s" for skipped; system a is always shown first."""
    with LabelsWriter(path) as writer:
        for annotator, winners in said.items():
            for c, w in zip(COMPARED, winners, strict=False):
                status = "skipped" if w == "s" else "labelled"
                writer.append(
                    [label_of(c, annotator, status, NAMES[w], "ab", "tldr-1", 1.0, 9.0 if w == "t" else 1.0)]
                )
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measure(**changes) -> dict:
    path = run(AgreementRecipe(**{"run_dir": "run", **changes}))
    assert path == Path("run/agreement.json")
    return json.loads(path.read_text())


def between(found: dict, one: str, other: str) -> dict:
    (row,) = [x for x in found["agreement"] if (x["rater_1"], x["rater_2"]) == (one, other)]
    return row["agreement"]


def test_judge_and_one_person(folder, capsys):
    """7 of 10 alike; by chance .5 x .4 + .4 x .5 + .1 x .1 = .41; kappa = (.7 - .41) / .59."""
    found = measure(judgments=[write_judge("j.jsonl", JUDGE)], labels=[write_labels("l.jsonl", anna=ANNA)])
    (only,) = found["agreement"]
    assert only["kind"] == "judge and person"
    both = between(found, "judge", "anna")
    assert (both["n"], both["undecided"]) == (10, 0)
    assert both["agreement"] == pytest.approx(0.7) and both["chance"] == pytest.approx(0.41)
    assert both["kappa"] == pytest.approx(0.29 / 0.59)
    assert both["low"] < 0.7 < both["high"] and both["kappa_low"] < both["kappa"] < both["kappa_high"]
    assert found["ceilings"] == [] and found["people_together"] is None
    out = capsys.readouterr().out
    assert "judge, anna" in out and "70.0% [39.7, 89.2]" in out and "0.49 [" in out  # Wilson for 7 of 10
    assert "judged and labelled: 10" in out


def test_two_people_and_the_ceiling(folder):
    """On the four pairs of both: people agree on 3. Each label: a 5/8, b 3/8, so chance is 34/64."""
    found = measure(
        judgments=[write_judge("j.jsonl", JUDGE)], labels=[write_labels("l.jsonl", anna=ANNA, ben=BEN)]
    )
    assert [(x["kind"], x["agreement"]["n"]) for x in found["agreement"]] == [
        ("judge and majority", 10),
        ("judge and person", 10),
        ("judge and person", 4),
        ("person and person", 4),
    ]
    assert between(found, "anna", "ben")["agreement"] == pytest.approx(3 / 4)
    # The majority is anna's, but for the third: one vote each, which is a tie.
    assert between(found, "judge", "majority")["agreement"] == pytest.approx(6 / 10)
    (ceiling,) = found["ceilings"]
    ceiling = ceiling["ceiling"]
    assert ceiling["num_pairs"] == 4
    assert ceiling["judge"]["value"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert ceiling["humans"]["value"] == pytest.approx(3 / 4)
    assert ceiling["difference"]["value"] == pytest.approx(-0.125)
    kappa = (3 / 4 - 34 / 64) / (1 - 34 / 64)
    assert ceiling["human_kappa"] == pytest.approx(kappa)
    people = found["people_together"]
    assert (people["num_pairs"], people["kappa"]) == (4, pytest.approx(kappa))
    assert people["agreement"]["value"] == pytest.approx(3 / 4)
    assert found["counts"] == {
        "comparisons": 10,
        "judged": 10,
        "labelled": 10,
        "judged and labelled": 10,
        "labelled by several": 4,
    }


def test_habits_and_win_rates(folder):
    """System a has the longer response everywhere and is always shown first."""
    found = measure(
        judgments=[write_judge("j.jsonl", JUDGE)], labels=[write_labels("l.jsonl", anna=ANNA, ben=BEN)]
    )
    habits = {x["name"]: x for x in found["habits"]}
    assert list(habits) == ["judge", "all labels", "anna", "ben"]
    assert habits["anna"]["position"]["first_share"] == pytest.approx(4.5 / 10)
    assert habits["anna"]["longer_wins"]["rate"] == pytest.approx(4.5 / 10)
    assert habits["anna"]["ties"] == pytest.approx(0.1)
    assert habits["all labels"]["num_verdicts"] == 14
    assert habits["judge"]["position"]["first_share"] == pytest.approx(0.5)
    assert habits["judge"]["position"]["consistency"]["agreement"] == pytest.approx(1.0)
    assert habits["judge"]["longer_wins"]["rate"] == pytest.approx(5.5 / 10)
    (rates,) = found["win_rates"]
    assert (rates["system_a"], rates["system_b"]) == (BETTER, WORSE)
    assert rates["by_judge"]["rate"] == pytest.approx(5.5 / 10)
    assert rates["by_people"]["rate"] == pytest.approx(4 / 10)  # 1 1 .5 0 0 0 0 0 1 .5
    assert rates["difference"]["difference"] == pytest.approx(0.15)


def test_the_longer_response_may_be_either_and_equal_lengths_say_nothing():
    """a longer and wins, a shorter and wins, b longer and wins, a tie, equal lengths: 1, 0, 1 and 0.5 of four."""
    lengths, winners = [(3, 2), (2, 3), (2, 3), (3, 2), (2, 2)], ["a", "a", "b", "tie", "a"]
    said = [
        label_of(replace(c, response_a="x" * a, response_b="y" * b), "anna", "labelled", winner, None)
        for c, (a, b), winner in zip(COMPARED, lengths, winners, strict=False)
    ]
    (anna,) = rater_habits(side_by_side([], said))
    assert (anna.num_verdicts, anna.position) == (5, None)
    assert anna.longer_wins.rate == pytest.approx(2.5 / 4) and anna.longer_wins.undecided == 1


def test_by_confidence(folder):
    found = measure(judgments=[write_judge("j.jsonl", JUDGE)], labels=[write_labels("l.jsonl", anna=ANNA)])
    levels = {x["confidence"]: x["agreement"] for x in found["by_confidence"]}
    assert levels[9.0]["n"] == 1 and levels[9.0]["agreement"] == 1 and levels[9.0]["kappa"] is None
    assert levels[1.0]["n"] == 9 and levels[1.0]["agreement"] == pytest.approx(6 / 9)


def test_judges_against_each_other_and_without_people(folder, capsys):
    judges = [write_judge("1.jsonl", JUDGE), write_judge("2.jsonl", "aaaaaaaaaa", "other")]
    found = measure(judgments=judges)
    (only,) = found["agreement"]
    assert only["kind"] == "judge and judge"
    assert only["agreement"]["agreement"] == pytest.approx(0.5) and only["agreement"][
        "kappa"
    ] == pytest.approx(0)
    assert found["win_rates"] == found["by_confidence"] == [] and "judge, other" in capsys.readouterr().out


def test_people_without_a_judge(folder):
    found = measure(labels=[write_labels("1.jsonl", anna=ANNA), write_labels("2.jsonl", ben=BEN)])
    assert [x["kind"] for x in found["agreement"]] == ["person and person"]
    assert found["people_together"]["agreement"]["value"] == pytest.approx(3 / 4) and found["ceilings"] == []


def test_what_is_left_out_is_counted_and_shown(folder, capsys):
    found = measure(
        judgments=[write_judge("j.jsonl", "a-aaaaaa")],
        labels=[write_labels("l.jsonl", anna="aasbbbbbab", ben="sss")],
    )
    assert found["left_out"] == {
        "judgments of judge that are undecided": 1,
        "comparisons that an annotator skipped": 4,
    }
    assert found["counts"] == {
        "comparisons": 10,
        "judged": 7,
        "labelled": 9,
        "judged and labelled": 6,
        "labelled by several": 0,
    }
    assert between(found, "judge", "anna")["n"] == 6
    out = capsys.readouterr().out
    assert "left out: judgments of judge that are undecided: 1" in out and "labelled: 9" in out


def test_a_win_with_a_tie_is_a_win_or_a_tie(folder):
    path = write_judge("j.jsonl", "aaa")
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines[0]["winner"] = "tie"
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = [write_labels("l.jsonl", anna="aab")]
    rates = {
        half: between(measure(judgments=[path], labels=labels, half_tie=half), "judge", "anna")["agreement"]
        for half in ("half", "tie")
    }
    assert rates == {"half": pytest.approx(2 / 3), "tie": pytest.approx(1 / 3)}


def test_other_questions_are_noted(folder, capsys):
    judgments = [write_judge("j.jsonl", JUDGE, prompt="hh_helpful-1")]
    found = measure(judgments=judgments, labels=[write_labels("l.jsonl", anna=ANNA)])
    assert found["notes"] == ["not everybody was asked the same: hh_helpful-1, tldr-1"]
    assert found["notes"][0] in capsys.readouterr().out
    unasked = [write_judge("j.jsonl", JUDGE, prompt=None)]
    assert measure(judgments=unasked, labels=["l.jsonl"])["notes"] == []


def test_nothing_in_common_is_an_error_that_says_what_there_is(folder):
    judgments = [write_judge("j.jsonl", "aaa")]
    labels = [write_labels("l.jsonl", anna="sssaa")]
    with pytest.raises(
        DataError, match="no two raters decided one comparison in common.*judged: 3, labelled: 2"
    ):
        measure(judgments=judgments, labels=labels)
    with pytest.raises(DataError, match="one rater only"):
        measure(judgments=judgments)
    with pytest.raises(ValueError, match="judgments names j.jsonl twice"):
        measure(judgments=judgments * 2)
    with pytest.raises(ConfigError, match="must name files"):
        measure()
    with pytest.raises(DataError, match="no labels file"):
        measure(judgments=judgments, labels=["none.jsonl"])


def test_the_demo_from_judge_and_labels_to_the_table(folder, capsys):
    """An annotator who knows the true reward, against the judge that does."""
    judge = load_recipe(JudgeRecipe, find_recipe("demo/judge.yaml"), [])
    label = load_recipe(LabelRecipe, find_recipe("demo/label.yaml"), [])
    make_demo_inputs(*judge.completions)
    run_judge(judge)
    compared = matchups_to_label(label)
    path = Path(label.run_dir) / "labels.jsonl"
    with closing(LabelQueue(compared, LabelsWriter(path), PROMPTS["tldr-1"], ties=True)) as queue:
        while pair := (state := queue.state("anna"))["pair"]:
            first, second = (true_reward(pair["prompt"], pair[slot], True) for slot in ("first", "second"))
            choice = "tie" if first == second else "first" if first > second else "second"
            queue.choose(state["annotator"], pair["id"], choice, 1)
    found = json.loads(run(load_recipe(AgreementRecipe, find_recipe("demo/agreement.yaml"), [])).read_text())
    (only,) = found["agreement"]
    assert only["agreement"]["n"] == len(compared) and only["agreement"]["agreement"] == 1
    assert found["counts"]["judged"] == 256 and found["win_rates"][0]["difference"]["difference"] == 0
