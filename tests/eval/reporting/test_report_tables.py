"""The tables of a report in hand-made numbers, the Markdown page, and comparisons that cannot be shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from report_comparisons import comparison, empty_comparison, estimate, paired_test

from drpo.data.records import DataError
from eval.reporting.comparison import (
    DifferenceRow,
    Estimate,
    MeasureRow,
    comparison_from,
    read_comparison,
    write_comparison,
)
from eval.reporting.html import script_json
from eval.reporting.report import headline, write_report
from eval.reporting.report_markdown import escaped, markdown_table
from eval.reporting.report_tables import (
    Cell,
    Column,
    Table,
    differences_table,
    interval_text,
    judge_table,
    matches_table,
    number_text,
    p_text,
    ranking_table,
    reading,
    results_table,
)


def rows_of(**changes):
    return comparison_from(comparison(**changes))


def difference_row(*fields):
    return DifferenceRow(**paired_test(*fields))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "unit", "text"),
    [
        (0.702, 1, "%", "70.2"),
        (0.702, 1, "", "0.7"),
        (-0.004, 2, "nats", "0.00"),
        (-0.25, 2, "", "-0.25"),
        (1234.5, 0, "tokens", "1234"),
        (None, 1, "%", "–"),
    ],
)
def test_a_number_in_its_unit(value, digits, unit, text):
    assert number_text(value, digits, unit) == text


def test_an_interval_stands_in_brackets_and_only_where_there_is_one():
    assert interval_text(Estimate(0.702, 0.661, 0.74), 1, "%") == "70.2 [66.1, 74.0]"
    assert interval_text(Estimate(0.702, None, None), 1, "%") == "70.2"
    assert interval_text(Estimate(None, None, None), 1, "%") == interval_text(None, 1, "%") == "–"


def test_a_p_value_is_never_zero():
    assert [p_text(p) for p in (0.0, 0.0009, 0.001, 0.0314, 1.0, None)] == [
        *("< 0.001", "< 0.001", "0.001", "0.031", "1.000", "–")
    ]


# --- tables -----------------------------------------------------------------------------------------------


def test_the_results_have_a_row_for_each_system_and_a_column_for_each_measure():
    table = results_table(rows_of())
    assert [column.name for column in table.columns] == [
        *("system", "win rate (%)", "LC win rate (%)", "true reward", "KL (nats)", "length (tokens)")
    ]
    assert texts(table)[1:] == [
        ["DR-PO beta 0.5", "60.0 [55.0, 65.0]", "–", "0.50 [0.30, 0.70]", "5.50", "–"],
        ["PPO", "41.0 [36.0, 46.0]", "–", "-0.25 [-0.40, -0.10]", "6.00 [5.50, 6.50]", "24.0 [22.0, 26.0]"],
    ]
    assert table.rows[0][0].notes == ("DR-PO, setting 1, 3 runs",)
    assert table.rows[0][1].notes == ("runs 69.0, 70.2, 71.4", "better than PPO")
    assert table.rows[2][0].warnings == ("2% of the responses hold a suspected attack",)


def test_the_better_system_is_marked_in_the_measure_that_a_test_resolves():
    table = results_table(rows_of())
    strong = {
        (row[0].text, table.columns[i].name)
        for row in table.rows
        for i, cell in enumerate(row)
        if cell.strong
    }
    # The KL differs for sure, but neither side of it is better.
    assert strong == {("DR-PO beta 1", "win rate (%)"), ("DR-PO beta 0.5", "true reward")}


def test_beating_many_systems_is_counted_not_listed():
    whole = comparison()
    names = [f"system {i}" for i in range(4)]
    whole["systems"] += [dict(whole["systems"][2], name=name) for name in names]
    whole["tests"] = [
        paired_test("win_rate", "PPO", name, 0.1, 0.05, 0.15, 0.001, 0.001) for name in names[:3]
    ]
    assert results_table(comparison_from(whole)).rows[2][1].notes == (
        "better than system 0, system 1, system 2",
    )
    whole["tests"].append(paired_test("win_rate", names[3], "PPO", -0.1, -0.15, -0.05, 0.001, 0.001))
    assert results_table(comparison_from(whole)).rows[2][1].notes == ("better than 4 systems",)


@pytest.mark.parametrize(
    ("limits", "p_holm", "better", "words"),
    [
        ((0.08, 0.02, 0.14), 0.03, "high", "one is better"),
        ((0.08, 0.02, 0.14), 0.03, "low", "two is better"),
        ((-0.08, -0.14, -0.02), 0.03, "high", "two is better"),
        ((-0.08, -0.14, -0.02), 0.03, None, "one is lower"),
        ((0.08, -0.01, 0.17), 0.2, "high", "not resolved at this n, which can show 0.09 or more"),
        ((0.08, 0.0, 0.16), 0.049, "high", "not resolved at this n, which can show 0.09 or more"),
        ((0.08, 0.02, 0.14), 0.05, "high", "not resolved once every test is counted (Holm)"),
        ((None, None, None), None, "high", "no test: nothing is decided"),
    ],
)
def test_a_test_in_words(limits, p_holm, better, words):
    test = difference_row("m", "one", "two", *limits, 0.01, p_holm)
    assert reading(test, MeasureRow("m", "m", "", 2, better, "")) == words


def test_an_interval_without_0_proves_nothing_where_p_does_not():
    test = difference_row("m", "one", "two", 0.008, 0.002, 0.02, 0.125, 0.125)
    words = reading(test, MeasureRow("m", "m", "%", 1, "high", ""))
    assert words == "not resolved at this n, which can show 8.5 or more"


def test_over_seeds_nobody_says_what_could_be_shown():
    test = replace(difference_row("m", "one", "two", 0.08, -0.01, 0.17, 0.1, 0.2), detectable=None)
    assert reading(test, MeasureRow("m", "m", "", 2, "high", "")) == "not resolved at this n"


def test_the_tests_and_how_each_system_was_judged():
    assert texts(differences_table(rows_of()))[1] == [
        "DR-PO beta 1 minus DR-PO beta 0.5",
        *("win rate (%)", "5.0 [-1.0, 11.0]", "0.100", "0.200", "256", "prompts"),
        "not resolved at this n, which can show 8.5 or more",
    ]
    rows = judge_table(rows_of()).rows
    assert [row[0].text for row in rows] == ["DR-PO beta 1", "DR-PO beta 0.5"]  # nobody judged PPO
    assert [cell.text for cell in rows[0][1:]] == [
        *("2", "1", "0", "1", "1 refused", "62.5", "87.5", "90.0 [80.0, 95.0]", "52.0")
    ]
    assert rows[0][-1].notes == ("p = 0.310",)


def test_systems_that_met_each_other():
    assert texts(matches_table(rows_of())) == [
        ["DR-PO beta 1 against DR-PO beta 0.5", "55.0 [50.0, 60.0]", "140", "2", "113", "1", "255"]
    ]
    assert matches_table(rows_of(matches=[])) is None


def test_the_ranking():
    table = ranking_table(rows_of())
    assert texts(table) == [["DR-PO beta 1", "1149 [1116, 1182]"], ["reference", "1000"]]
    assert table.notes == (
        "From 768 comparisons with the baseline and of systems with each other, relative to reference.",
        "PPO never met DR-PO",
    )
    assert ranking_table(rows_of(ranking=None)) is None


def test_the_headline():
    facts = dict(headline(rows_of()))
    assert facts["judge"] == "judge-1, openai, prompt tldr-1, both orders, ties allowed"
    assert facts["spent on the judge"] == "1,536 calls, 812,345 prompt tokens, $1.23"
    assert facts["written"] == "2026-11-21 09:00 UTC"
    assert facts["prompts"] == "256"
    assert facts["commit"] == "abc1234"
    assert dict(headline(rows_of(commit="0123456789abcdef" * 2 + "01234567+changes")))["commit"] == (
        "0123456789ab+changes"
    )
    facts = dict(headline(comparison_from(empty_comparison())))
    assert facts["judge"] == "none" and facts["commit"] == "unknown"


# --- Markdown ---------------------------------------------------------------------------------------------


def test_markdown_shows_text_as_it_is():
    assert escaped("a|b\nc") == r"a\|b c"
    assert escaped("<img src=x> [x](y) `z` *w*") == r"\<img src=x\> \[x\](y) \`z\` \*w\*"
    assert escaped("win_rate _x_ \\|") == r"win_rate \_x\_ \\\|"


def test_a_markdown_table():
    rows = ((Cell("a|b", ("note",), ("look\nhere",)), Cell("1.0", strong=True)),)
    table = Table("T", (Column("system", numeric=False), Column("value")), rows, ("Below.",))
    assert markdown_table(table).splitlines() == [
        "| system | value |",
        "| --- | ---: |",
        r"| a\|b<br>note<br>**Warning:** look here | **1.0** |",
        "",
        "Below.",
    ]


def test_the_markdown_page_has_every_table_and_no_example(tmp_path):
    write_report(rows_of(title="a | b\n# c"), tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert page.startswith("# a \\| b \\# c\n")
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        *("Results", "Judged against reference", "Differences between systems"),
        *("Judged against each other", "Ranking"),
        *("What the numbers are", "Win rate against reference", "LC win rate against reference"),
        *("True reward against KL", "Win rate against length", "Win rate over beta"),
        *("Hashes of DR-PO beta 1/0", "Versions"),
    ]
    assert "Answer two" not in page
    cells = [line.replace(r"\|", "").count("|") for line in page.splitlines() if line.startswith("| PPO")]
    assert cells == [7, 9, 3, 6, 4]


# --- what cannot be shown ---------------------------------------------------------------------------------


def broken(path: list, value: object = None, remove: bool = False) -> dict:
    whole = comparison()
    place = whole
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (broken(["baseline"], remove=True), r"baseline is missing"),
        (broken(["systems", 1, "judged", "ties"], remove=True), r"systems\[1\]\.judged\.ties is missing"),
        (broken(["systems", 0, "values", "kl"], remove=True), r"systems\[0\]\.values\.kl is missing; null"),
        (broken(["title"], 3), r"title must be a valid string, got 3"),
        (broken(["systems"], {}), r"systems must be a valid list, got {}"),
        (
            broken(["measures", 0, "digits"], 10**6),
            r"measures\[0\]\.digits must be less than or equal to 15, got 1000000",
        ),
        (
            broken(["systems", 0, "values", "kl", "value"], 10**400),
            r"systems\[0\]\.values\.kl\.value must be a valid number, got int 1000",
        ),
        (
            broken(["measures", 0, "digits"], -1),
            r"measures\[0\]\.digits must be greater than or equal to 0, got -1",
        ),
        (
            broken(["measures", 0, "better"], "most"),
            r"measures\[0\]\.better must be 'high' or 'low', got 'most'",
        ),
        (
            broken(["systems", 0, "values", "kl", "low"], float("nan")),
            r"values\.kl\.low must be a finite number",
        ),
        (
            broken(["systems", 0, "values", "kl", "value"], True),
            r"kl\.value must be a valid number, got True",
        ),
        (
            broken(["examples", 2, "verdicts", 1, "status"], "lost"),
            r"examples\[2\]\.verdicts\[1\]\.status must be",
        ),
        (
            broken(["examples", 0, "prefix_a"], 99),
            r"examples\[0\]\.prefix_a must be at most the 56 characters",
        ),
        (broken(["examples", 1, "id"], "one"), r"examples\[1\]\.id must be unique, 'one'"),
        (broken(["systems", 1, "name"], "PPO"), r"systems\[2\]\.name must be unique"),
        (
            broken(["tests", 3, "measure"], "elo"),
            r"tests\[3\]\.measure must be the key of a measure, got 'elo'",
        ),
        (broken(["frontiers", 0, "reward"], "x"), r"frontiers\[0\]\.reward must be the key of a measure"),
        ([], r"the whole must be a mapping, got \[\]"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(whole, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write_report(comparison_from(whole), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [comparison(), empty_comparison()])
def test_a_file_reads_back_as_it_was_written(content, tmp_path):
    write_comparison(comparison_from(content), tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert found == content
    assert (
        read_comparison(tmp_path) == read_comparison(tmp_path / "comparison.json") == comparison_from(content)
    )


def test_fields_of_a_later_version_are_ignored():
    more = comparison(more="a field of a later version")
    more["systems"][0]["more"] = {}
    assert comparison_from(more) == rows_of()


def test_a_producer_cannot_leave_out_a_measure():
    whole = rows_of()
    bare = replace(whole.systems[1], values={})
    with pytest.raises(DataError, match=r"systems\[0\]\.values\.win_rate is missing"):
        replace(whole, systems=(bare,))


def test_json_in_a_script_cannot_end_it_and_reads_back():
    text = '</script><!-- & \u2028 \u2029 \ud800 \U0001f600 " \\ \0'
    packed = script_json({"a": text})
    assert not set("<>&\u2028\u2029\ud800\0") & set(packed)
    assert json.loads(packed) == {"a": text}
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_half_of_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    whole = comparison(title="half \ud800")
    whole["systems"][0]["values"]["kl"] = estimate(1.0)
    page = write_report(comparison_from(whole), tmp_path).read_text(encoding="utf-8")
    assert "<title>half ?</title>" in page
