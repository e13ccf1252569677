"""A comparison of systems as JSON: small hand-made systems, whose table, tests, frontier and examples are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from eval.comparing.result import compare_systems
from eval.comparing.systems import Run, System, judged_values, measures_of, text_values
from eval.completions.rows import CompletionRow, prompt_id_of
from eval.judging.verdict import Verdict, combine_all
from eval.statistics.across_runs import Values

PROMPTS = [f"POST: number {i}\nTL;DR:" for i in range(12)]
IDS = [prompt_id_of(prompt) for prompt in PROMPTS]
nan = float("nan")


def rows_of(system, length=3, ended=True):
    """Responses of `length` + i words, of which the reference has the first two."""
    return [
        CompletionRow(
            system,
            IDS[i],
            prompt,
            " good words" + " more" * (length + i - 2),
            ended,
            length + i,
            0,
            " good words",
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def verdicts_of(system, winners, baseline="base"):
    """Both orders of each prompt: a or b wins both, - is won by the first slot, x was refused."""
    verdicts = []
    for prompt_id, winner in zip(IDS, winners, strict=True):
        for order in ("ab", "ba"):
            won = {"a": "a", "b": "b", "-": order[0], "x": None}[winner]
            status = "refused" if winner == "x" else "ok"
            suspicions = ("asks for votes",) if winner == "x" else ()
            verdicts.append(
                Verdict(
                    prompt_id,
                    system,
                    baseline,
                    0,
                    order,
                    status,
                    won,
                    30 + IDS.index(prompt_id),
                    33,
                    "no" * (won is None),
                    suspicions,
                )
            )
    return verdicts


def judged(system, winners, source="policy", **values):
    rows = rows_of(system)
    verdicts = verdicts_of(system, winners)
    judgments = combine_all(verdicts)
    known = {name: Values(tuple(IDS), np.array(numbers, dtype=float)) for name, numbers in values.items()}
    answers = {(IDS[0], 0, "ab"): "A is better"}
    return Run(
        source,
        rows,
        {**text_values(rows), **known, "win_rate": judged_values(judgments)},
        verdicts,
        judgments,
        answers,
        hashes={"weights_sha256": "abc"},
        config="num_steps: 3\n",
    )


BASELINE = System("base", "base", None, (Run("file", rows_of("base", 5), text_values(rows_of("base", 5))),))
GOOD = System("good", "m", 1.0, (judged("good", "aaaaaaaaaab-", kl=[2.0] * 12, reward=[3.0] * 11 + [4.0]),))
POOR = System("poor", "m", 0.5, (judged("poor", "bbbbbbbbbbax", kl=[1.0, 3.0] * 6, reward=range(12)),))
FREE = System("free", "free", None, (judged("free", "bbbbbbbbbbbb", kl=[0.0] * 12, reward=[-1.0] * 12),))
MEASURES = measures_of("base", True, True, ["reward"])


def compare(*systems, **further):
    result = compare_systems([*systems, BASELINE], MEASURES, "base", "beta", **further)
    return json.loads(json.dumps(result, default=vars, allow_nan=False))


@pytest.fixture(scope="module")
def result():
    return compare(GOOD, POOR, FREE)


def row(result, name):
    (found,) = (system for system in result["systems"] if system["name"] == name)
    return found


def test_the_columns_are_those_of_the_papers_table(result):
    names = [measure["name"] for measure in result["measures"]]
    assert names[:4] == ["win rate", "LC win rate", "reward", "KL"]
    assert names[4:] == ["ROUGE-1", "ROUGE-2", "ROUGE-L", "length", "ended"]
    assert all(measure["help"] for measure in result["measures"])


def test_a_row_by_hand(result):
    good = row(result, "good")
    assert (good["num_runs"], good["num_prompts"], good["setting"]) == (1, 12, 1.0)
    win = good["values"]["win_rate"]
    assert win["value"] == pytest.approx(10.5 / 12) and 0 < win["low"] < win["value"] < win["high"] <= 1
    assert good["values"]["kl"] == {
        "value": 2.0,
        "low": 2.0,
        "high": 2.0,
        "runs": [2.0],
        "method": "constant",
    }
    assert good["values"]["num_tokens"]["value"] == pytest.approx(3 + 5.5)
    # ROUGE-1: 2 words of 2 in 3 + i words: F1 = 4 / (5 + i)
    assert good["values"]["rouge1"]["value"] == pytest.approx(np.mean([4 / (5 + i) for i in range(12)]))
    judged = good["judged"]
    assert (judged["wins"], judged["ties"], judged["losses"], judged["undecided"]) == (10, 1, 1, 0)
    assert judged["consistent"] == pytest.approx(11 / 12)
    assert judged["first_slot_wins"] == pytest.approx((11 * 0.5 + 1) / 12)


def test_what_is_undecided_bounds_the_rate_and_is_no_loss(result):
    poor = row(result, "poor")
    low, high = proportion_confint(1, 11, method="wilson")
    assert poor["values"]["win_rate"] == {
        "value": pytest.approx(1 / 11),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "runs": [pytest.approx(1 / 11)],
        "method": "wilson",
    }
    judged = poor["judged"]
    assert (judged["worst_case"], judged["best_case"]) == (pytest.approx(1 / 12), pytest.approx(2 / 12))
    assert judged["statuses"]["refused"] == 2 and judged["undecided"] == 1


def test_the_baseline_has_no_win_rate_of_its_own(result):
    base = row(result, "base")
    assert base["judged"] is None and base["values"]["win_rate"] is None and base["values"]["kl"] is None
    assert base["values"]["num_tokens"]["value"] == pytest.approx(5 + 5.5)


def test_every_two_systems_are_tested_and_holm_makes_it_harder(result):
    tests = {(test["system_1"], test["system_2"]): test for test in result["tests"]}
    assert list(tests) == [("good", "poor"), ("good", "free"), ("poor", "free")]
    better = tests["good", "free"]
    # 11 prompts differ, all one way: 2 / 2^11 of the sign flips are as extreme
    assert better["difference"] == pytest.approx(10.5 / 12) and better["p_value"] == pytest.approx(2 / 2**11)
    assert better["p_holm"] >= better["p_value"] and better["over"] == "prompts"
    assert tests["poor", "free"]["p_value"] == tests["poor", "free"]["p_holm"] == 1.0


def test_the_ranking_has_the_baseline_at_1000(result):
    systems = {each["name"]: each for each in result["ranking"]["systems"]}
    assert [each["name"] for each in result["ranking"]["systems"]] == ["good", "base", "poor", "free"]
    assert systems["base"]["elo"] == 1000 and result["ranking"]["anchor"] == "base"
    assert any("free" in warning for warning in result["ranking"]["warnings"])


def test_judgments_between_systems_count_in_the_ranking_alone():
    verdicts = verdicts_of("free", "aaaaaaaaaaab", baseline="good")
    more = compare(GOOD, POOR, FREE, more_judgments=combine_all(verdicts))
    plain = compare(GOOD, POOR, FREE)
    assert more["systems"] == plain["systems"] and plain["matches"] == []
    (match,) = more["matches"]
    assert (match["system_1"], match["system_2"]) == ("free", "good")
    assert (match["wins"], match["losses"], match["num_prompts"]) == (11, 1, 12)
    assert match["value"] == pytest.approx(11 / 12)
    assert more["ranking"]["num_comparisons"] == plain["ranking"]["num_comparisons"] + 12
    assert not any("free" in warning for warning in more["ranking"]["warnings"])


def test_the_frontier_keeps_whom_nobody_beats(result):
    by_reward = {each["reward"]: each["points"] for each in result["frontiers"]}
    assert set(by_reward) == {"win_rate", "reward"}
    on_front = {point["system"]: point["on_front"] for point in by_reward["reward"]}
    # free: KL 0; good: KL 2, reward 37 / 12; poor: KL 2, reward 5.5
    assert on_front == {"free": True, "good": False, "poor": True}
    assert [point["system"] for point in by_reward["win_rate"]] == ["good", "poor", "free"], (
        "in the order given"
    )


def test_settings_of_one_method_become_curves(result):
    curves = {curve["measure"]: curve for curve in result["curves"]}
    assert set(curves) == {"win_rate", "reward", "kl"}
    assert curves["kl"]["setting"] == "beta" and {p["method"] for p in curves["kl"]["points"]} == {"m"}
    assert [(p["system"], p["setting"]) for p in curves["reward"]["points"]] == [("poor", 0.5), ("good", 1.0)]


def test_several_runs_have_seeds_in_their_intervals():
    apart = [judged("s", "aaaaaabbbbbb"), judged("s", "aaaaaaaaaaab"), judged("s", "bbbbbbbbbbba")]
    values = row(compare(System("s", "s", None, tuple(apart)), FREE), "s")["values"]["win_rate"]
    assert values["method"] == "seeds" and values["runs"] == pytest.approx([6 / 12, 11 / 12, 1 / 12])
    single = row(compare(System("s", "s", None, (apart[0],)), FREE), "s")["values"]["win_rate"]
    assert values["high"] - values["low"] > single["high"] - single["low"]


def test_a_length_controlled_rate_of_several_runs_is_wider_than_that_of_all_pooled():
    winners = ["aababbabaabb", "aaaabaababab", "bbabababbaba"]
    system = System("s", "s", None, tuple(judged("s", each) for each in winners))
    value = row(compare(system, FREE), "s")["values"]["lc_win_rate"]
    assert value["method"] == "widened by seeds" and len(value["runs"]) == 3
    assert min(value["runs"]) < value["value"] < max(value["runs"])


def test_what_cannot_be_told_is_said_and_not_made_up():
    undecided = System("u", "u", None, (judged("u", "xxxxxxxxxxxx"),))
    found = row(compare(undecided, GOOD), "u")
    assert found["values"]["win_rate"] is None and found["values"]["lc_win_rate"] is None
    assert any("win rate" in warning for warning in found["warnings"])
    assert (found["judged"]["worst_case"], found["judged"]["best_case"]) == (0.0, 1.0)
    assert found["judged"]["consistent"] is None


def test_a_pair_without_a_test_says_why_and_takes_no_part_in_the_correction():
    undecided = System("u", "u", None, (judged("u", "xxxxxxxxxxxx"),))
    tests = compare(undecided, GOOD, FREE)["tests"]
    by_pair = {(test["system_1"], test["system_2"]): test for test in tests}
    none = by_pair["u", "good"]
    assert (none["difference"], none["p_value"], none["p_holm"], none["num_prompts"]) == (None, None, None, 0)
    assert "none of 12 rows is decided for both" in none["reason"]
    alone = by_pair["good", "free"]
    assert alone["p_holm"] == alone["p_value"] and alone["reason"] is None, "one test needs no correction"


def test_systems_that_never_met_have_no_ranking_and_a_reason():
    apart = combine_all(verdicts_of("x", "abababababab", baseline="y"))
    result = compare(GOOD, FREE, more_judgments=apart)
    assert result["ranking"]["systems"] == [] and "no ranking" in result["ranking"]["warnings"][0]


def test_examples_stand_beside_the_baseline(result):
    assert len(result["examples"]) == 3 * 12
    first = next(
        each for each in result["examples"] if each["system"] == "poor" and each["prompt_id"] == IDS[11]
    )
    assert first["id"] == f"poor/0/{IDS[11]}/0" and first["baseline"] == "base"
    assert first["response_a"] != first["response_b"] == rows_of("base", 5)[11].response
    assert (first["score"], first["consistent"]) == (None, None)
    assert [each["status"] for each in first["verdicts"]] == ["refused", "refused"]
    assert first["suspicions_a"] == ["asks for votes"] and first["values"]["reward"] == 11.0
    said = next(each for each in result["examples"] if each["id"] == f"good/0/{IDS[0]}/0")
    assert [each["text"] for each in said["verdicts"]] == ["A is better", None] and said["score"] == 1.0


def test_fewer_examples_are_of_the_same_prompts_for_all():
    few = compare(GOOD, POOR, num_examples=4)["examples"]
    assert {each["prompt_id"] for each in few} == set(sorted(IDS)[:4]) and len(few) == 8
    assert compare(GOOD, num_examples=0)["examples"] == []


def test_the_kl_of_other_samples_is_not_shown_beside_a_response():
    (run,) = GOOD.runs
    greedy = replace(GOOD, runs=(replace(run, sampled=False),))
    assert "kl" not in compare(greedy)["examples"][0]["values"]
    assert row(compare(greedy), "good")["values"]["kl"]["value"] == 2.0


def test_runs_keep_their_recipes_hashes_and_rollouts():
    rollout = {
        "step": 4,
        "prompt": "p",
        "prefix": "x",
        "continuation": "y",
        "ended": True,
        "scores": {"score": 1.0},
    }
    (run,) = GOOD.runs
    found = compare(replace(GOOD, runs=(replace(run, rollouts=[rollout]),)))
    assert found["configs"] == {"good/0": "num_steps: 3\n"} and found["hashes"] == {
        "good/0": {"weights_sha256": "abc"}
    }
    assert found["rollouts"] == [{"system": "good", **rollout}]


def test_a_baseline_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="baseline 'base' is not among the systems: good"):
        compare_systems([GOOD], MEASURES, "base", "beta")


def test_nothing_judged_leaves_the_measures_that_need_no_judge():
    (run,) = GOOD.runs
    plain = replace(
        GOOD,
        runs=(
            replace(
                run,
                verdicts=(),
                judgments=(),
                values={k: v for k, v in run.values.items() if k != "win_rate"},
            ),
        ),
    )
    result = compare_systems([plain, BASELINE], measures_of("base", False, True, ["reward"]), "base", "beta")
    assert result.tests == () and result.ranking is None
    assert [each.reward for each in result.frontiers] == ["reward"]


def test_text_values_leave_out_what_nobody_knows():
    rows = [replace(each, num_tokens=None, reference=None) for each in rows_of("s")]
    assert set(text_values(rows)) == {"ended"}
    assert "rouge1" not in text_values(rows_of("reference"))
    mixed = [*rows[:1], *rows_of("s")[1:]]
    values = text_values(mixed)
    assert np.isnan(values["num_tokens"].numbers[0]) and values["num_tokens"].numbers[1] == 4
