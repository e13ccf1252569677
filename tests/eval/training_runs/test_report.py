"""The page of a training run: the numbers of its files, marked prefixes, other runs, and files that are not whole."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from online_runs import forget_precision, run_online
from report_pages import page_viewer

from drpo.data.records import DataError
from eval.training_runs.report import report
from launch.report import main

ATTACK = "</div><script>window.pwned=1</script><img src=x onerror='window.pwned=2'>{{ 7 * 7 }}"
CHANGES = {
    "num_steps": 6,
    "reset": {"proportion": 0.7},
    "rollout": {"max_response_length": 16},
    "eval": {"every": 3, "num_prompts": 6, "temperature": 1.0},
    "log": {"samples_every": 2, "num_samples": 2},
}
PARTS = ["Held-out prompts", "By prefix fraction", "Where rollouts started"]


@pytest.fixture(scope="module")
def trained(policy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_online(policy_folder, folder / "drpo", CHANGES)
    run_online(policy_folder, folder / "ppo", {**CHANGES, "num_steps": 2, "reset": {"proportion": 0.0}})
    forget_precision()
    assert report(folder / "drpo") == folder / "drpo" / "training.html"
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A run with resets, to change."""
    ignored = shutil.ignore_patterns("checkpoints", "policy", "critic", "training.*")
    return Path(shutil.copytree(trained / "drpo", tmp_path / "run", ignore=ignored))


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells(page, part: str, index: int = 0) -> list[list[str]]:
    """The body of a table of a section."""
    rows = page.locator(f"#{part} table").nth(index).locator("tbody tr").all()
    return [row.locator("> *").all_inner_texts() for row in rows]


def names_of_groups(metrics: list[dict]) -> dict[str, str]:
    """The groups that have rollouts in some step, and the names that they should have."""
    bins = [("0", "0.25"), ("0.25", "0.5"), ("0.5", "0.75"), ("0.75", "1")]
    names = {"from_prompt": "bare prompt"}
    names |= {f"prefix_{low}_{high}": f"h/L in ({low}, {high}]" for low, high in bins}
    return {group: name for group, name in names.items() if any(f"{group}/score" in row for row in metrics)}


def test_the_pages_show_the_numbers_of_the_files(trained, chromium):
    folder = trained / "drpo"
    metrics, resets = rows_of(folder, "metrics.jsonl"), rows_of(folder, "resets.jsonl")
    groups = names_of_groups(metrics)
    assert len(groups) > 3
    with page_viewer(chromium) as show:
        page = show(folder / "training.html")
        assert page.locator("main h2").all_inner_texts() == [
            *PARTS,
            "Sample rollouts",
            "What the numbers are",
        ]
        names, texts = (page.locator(f".facts {tag}").all_inner_texts() for tag in ("dt", "dd"))
        facts = dict(zip(names, texts, strict=True))
        assert (facts["method"], facts["steps"], facts["seed"]) == ("DR-PO", "6 of 6", "0")
        assert facts["advantages"] == "estimator gae"
        assert facts["resets"] == "proportion 0.7, source reference, length uniform"
        assert facts["last evaluation"].startswith(f"step 6: score {metrics[-1]['eval/score']:.3f}, ")

        heads = page.locator("#held-out thead th").all_inner_texts()[1:]
        assert {"kl (nats)", "length (tokens)", "ended (share)"} < set(heads)
        keys = [f"eval/{head.partition(' ')[0]}" for head in heads]
        assert set(keys) == {"eval/score", "eval/kl", "eval/length", "eval/ended"}
        tables = [cells(page, "held-out")]
        assert tables[0] == [
            [str(step), *(f"{metrics[step][key]:.3f}".replace("-0.000", "0.000") for key in keys)]
            for step in (0, 3, 6)
        ]
        for index, metric in enumerate(("score", "kl_k1", "sampled_length")):
            tables.append(cells(page, "by-start", index))
            assert [row[0] for row in tables[-1]] == list(groups.values())
            for group, row in zip(groups, tables[-1], strict=True):
                for pair, text in zip(((1, 2), (3, 4), (5, 6)), row[1:], strict=True):
                    values = [metrics[step].get(f"{group}/{metric}") for step in pair]
                    values = [value for value in values if value is not None]
                    assert text == (f"{sum(values) / len(values):.3f}" if values else "–")

        tables.append(cells(page, "as-drawn"))
        for index, row in enumerate(tables[-1][:-1]):
            for pair, text in zip(((0, 1), (2, 3), (4, 5)), row[1:], strict=True):
                assert text == f"{100 * sum(resets[step]['fractions'][index] for step in pair) / 32:.1f}"
        lengths = [int(h) * count for step in (0, 1) for h, count in resets[step]["lengths"].items()]
        assert tables[-1][-1][:2] == ["mean forced tokens", f"{sum(lengths) / 32:.2f}"]

        images = page.locator("main img")
        assert images.count() == 4 + 3 + 2
        assert images.evaluate_all("images => images.every(image => image.naturalWidth > 100)")
    markdown = (folder / "training.md").read_text().replace("\\", "")
    rows = [f"| {' | '.join(row)} |" for table in tables for row in table]
    assert len(rows) == 3 + 3 * len(groups) + 12
    assert all(row in markdown for row in rows)


def test_forced_prefixes_are_marked_and_texts_are_never_markup(folder, chromium):
    samples = rows_of(folder, "samples.jsonl")
    rollouts = [row for row in samples if row["split"] == "rollout"]
    assert sorted({row["step"] for row in rollouts}) == [1, 2, 4, 6]
    for row in rollouts:
        row |= {
            "prefix": " forced <b>bold</b> |",
            "continuation": f" own {row['step']} {ATTACK}",
            "prompt": ATTACK,
        }
        row["scores"] = {"score": 0.25, ATTACK: 1.0}
    rollouts[-1] |= {"prefix": "", "prompt": "x" * 500 + "the end"}
    write_rows(folder / "samples.jsonl", samples)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "run_dir": ATTACK}))
    metrics = rows_of(folder, "metrics.jsonl")
    metrics[3][f"eval/$x_{ATTACK}"] = 1.0
    write_rows(folder / "metrics.jsonl", metrics)
    with page_viewer(chromium) as show:
        page = show(report(folder), width=360, height=640)
        assert page.locator("h1").inner_text() == f"Training run {ATTACK}"
        assert page.locator("#held-out thead th").last.inner_text() == f"$x_{ATTACK}"
        rows = page.locator(".samples tbody tr")
        assert rows.locator("td:first-child").all_inner_texts() == ["1", "1", "4", "4", "6", "6"]
        assert page.locator(".samples b").count() == 0
        marks = page.locator(".samples mark").all_text_contents()
        assert marks == [" forced <b>bold</b> |"] * 5
        first = rows.first.locator(".text")
        assert first.nth(0).text_content() == ATTACK
        assert first.nth(1).text_content() == f" forced <b>bold</b> | own 1 {ATTACK}"
        last = rows.last.locator(".text")
        assert last.nth(0).text_content() == "…" + "x" * 393 + "the end"
        assert "from the bare prompt" in rows.last.inner_text()
        assert "score 0.250" in rows.first.locator("td").last.inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    markdown = (folder / "training.md").read_text()
    assert r"| forced \<b\>bold\</b\> \| | own 1 \</div\>\<script\>" in markdown
    assert not re.search(r"(?<!\\)<", markdown)


def test_a_run_without_resets_says_so(trained, chromium):
    with page_viewer(chromium) as show:
        page = show(report(trained / "ppo"))
        assert page.locator(".facts dd").first.inner_text() == "PPO"
        assert "This run has no resets" in page.locator("#by-start").inner_text()
        assert page.locator("#as-drawn img, #as-drawn table").count() == 0
        assert page.locator("#by-start img").count() == 3
        metrics = rows_of(trained / "ppo", "metrics.jsonl")
        for index, metric in enumerate(("score", "kl_k1", "sampled_length")):
            rows = cells(page, "by-start", index)
            values = [metrics[step][f"objective/{metric}"] for step in (1, 2)]
            assert rows == [["bare prompt", *(f"{value:.3f}" for value in values)]]
        assert page.locator("mark").count() == 0
        assert page.locator("#held-out img").count() == 4
        assert page.locator(".samples tbody tr").count() == 4


def test_a_run_of_an_earlier_version_shows_the_kl_that_it_has(folder):
    row = {"step": 1, "from_prompt/score": 0.0, "from_prompt/kl_k3": 123.0, "from_prompt/kl_k1": 0.25}
    write_rows(folder / "metrics.jsonl", [row])
    report(folder)
    assert "| bare prompt | 0.250 |" in (folder / "training.md").read_text()
    del row["from_prompt/kl_k1"]
    write_rows(folder / "metrics.jsonl", [row])
    report(folder)
    assert "| bare prompt | 123.000 |" in (folder / "training.md").read_text()


def test_a_value_that_is_not_finite_is_shown(folder):
    metrics = rows_of(folder, "metrics.jsonl")
    next(row for row in metrics if "from_prompt/score" in row)["from_prompt/score"] = math.nan
    write_rows(folder / "metrics.jsonl", metrics)
    report(folder)
    assert "| bare prompt | nan |" in (folder / "training.md").read_text()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (
            {
                "length": "adaptive",
                "adaptive": {"target": "source", "margin": 0.1, "success": 0.5, "spread": 0.2},
            },
            "length adaptive, adaptive.target source, adaptive.margin 0.1, adaptive.success 0.5, adaptive.spread 0.2",
        ),
        (
            {"length": "uniform", "adaptive": {"target": "source", "margin": 0.5}, "own": {"size": 3}},
            "length uniform",
        ),
    ],
)
def test_the_settings_of_resets_are_those_with_an_effect(folder, settings, shown):
    """An earlier version had another default of a margin, which no run without adaptive lengths used."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["reset"] = {"proportion": 0.7, "source": "reference", **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report(folder)
    text = (folder / "training.md").read_text().replace("\\", "")
    assert f"**resets**: proportion 0.7, source reference, {shown}\n" in text


def test_an_adaptive_length_shows_its_position(folder, chromium):
    metrics = rows_of(folder, "metrics.jsonl")
    for row in metrics[1:]:
        row["reset/position"] = 1 - row["step"] / 10
    write_rows(folder / "metrics.jsonl", metrics)
    with page_viewer(chromium) as show:
        page = show(report(folder))
        assert page.locator("#by-start img").count() == 4
        assert "at the shortest allowed prefix to 1" in page.locator("main").inner_text()


def test_a_run_that_recorded_no_starts_says_so(folder):
    (folder / "resets.jsonl").unlink()
    (folder / "samples.jsonl").unlink()
    report(folder)
    text = (folder / "training.md").read_text()
    assert "The distribution was not recorded" in text and "has written no sample rollouts" in text
    assert "### Score" in text and "Share of rollouts by prefix fraction" not in text


def test_an_unfinished_last_line_is_left_out(folder, trained, capsys):
    for name in ("metrics.jsonl", "samples.jsonl", "resets.jsonl"):
        with (folder / name).open("ab") as file:
            file.write('{"step": 7, "ä'.encode()[:-1])
    main([str(folder / "metrics.jsonl")])
    assert capsys.readouterr().out == f"{folder.resolve() / 'training.html'}\n"
    for name in ("training.html", "training.md"):
        assert (folder / name).read_bytes() == (trained / "drpo" / name).read_bytes()


def test_a_run_in_its_first_steps_has_a_page(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for done in ([lines[0][:40]], lines[:2]):  # nothing, one step
        (folder / "metrics.jsonl").write_text("".join(done))
        (folder / "resets.jsonl").write_text("")
        (folder / "samples.jsonl").unlink(missing_ok=True)
        report(folder)
        text = (folder / "training.md").read_text()
        assert f"**steps**: {max(0, len(done) - 1)} of 6: still going, or interrupted" in text
    assert "No step has been recorded yet." in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "no recipe at .*config.yaml: No such file"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        (
            "config.yaml",
            "num_steps: 2\nloss_on: all\n",
            "is not of an online run, .* no reset.proportion, rollout.batch",
        ),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl:2 is not JSON"),
        ("metrics.jsonl", '{"step": 1, "a": "x"}\n', "metrics.jsonl:1 has no number as a; "),
        ("metrics.jsonl", '{"a": 1}\n', "metrics.jsonl:1 has no step"),
        ("samples.jsonl", '{"step": 1, "split": "rollout"}\n', "samples.jsonl:1 is no sample"),
        (
            "resets.jsonl",
            '{"step": 1, "lengths": {"0": 1}, "fractions": [1]}\n',
            "resets.jsonl:1 has no fractions",
        ),
        ("metrics.jsonl", f'{{"step": {10**400}}}\n', "metrics.jsonl:1 has no step"),
        (
            "metrics.jsonl",
            f'{{"step": 1, "eval/score": {10**400}}}\n',
            "metrics.jsonl:1 has no number as eval/score",
        ),
        (
            "resets.jsonl",
            f'{{"step": 1, "lengths": {{"{"1" * 50}": 1}}, "fractions": []}}\n',
            "resets.jsonl:1 has no lengths",
        ),
        (
            "resets.jsonl",
            '{"step": 1, "lengths": {"x": 1}, "fractions": []}\n',
            "resets.jsonl:1 has no lengths",
        ),
    ],
)
def test_what_cannot_be_read_is_one_message(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        report(folder)
    with pytest.raises(SystemExit, match=message):
        main([str(folder)])
    assert not (folder / "training.html").exists()


def test_a_metric_that_only_looks_like_a_prefix_group_is_none(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "prefix_9.9.9_8/score": 1.0, "prefix_._./score": 1.0}\n')
    assert "9.9.9" not in report(folder).read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nope",
            "nope does not exist: give the folder of a comparison, an evaluation or a run, or its comparison",
        ),
        ("samples.jsonl", "samples.jsonl is none of the files: give the folder"),
        ("config.yaml", "config.yaml is none of the files: give the folder"),
        ("comparison.json", "no comparison at .*comparison.json"),
    ],
)
def test_a_path_that_is_no_result_says_what_to_give(folder, name, message):
    with pytest.raises(SystemExit, match=message):
        main([str(folder / name)])


def test_a_folder_without_results_says_what_was_looked_for(folder):
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="holds none of comparison.json, evaluation.json, metrics.jsonl"):
        main([str(folder)])


def test_missing_metrics_and_two_kinds_of_results_are_refused(folder):
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds evaluation.json and metrics.jsonl: name one of them"):
        main([str(folder)])
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match="no metrics at .*metrics.jsonl; a run writes them"):
        main([str(folder / "metrics.jsonl")])
