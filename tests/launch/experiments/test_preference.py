"""Tables of preference runs: which runs they are made of, and what they show."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from tiny_runs import launch_warm

from drpo.config import ConfigError, load_recipe
from launch.command_line import find_recipe
from launch.experiments.preference import PreferenceExperimentRecipe, TableConfig, markdown, run

TINY = [
    "num_steps=2",
    "data.demo.num_train=400",
    "data.demo.num_eval=8",
    "data.demo.seed={seed}",
    "batch.size=8",
    "batch.microbatch_size=8",
    "optim.warmup_steps=0",
    "eval.every=2",
    "sample.num_prompts=4",
]


def recipe_for(tmp_path, **tables) -> PreferenceExperimentRecipe:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "runs"), "tables": tables}))
    return load_recipe(PreferenceExperimentRecipe, path, [])


def test_runs_every_cell_once_and_writes_tables_and_plots(tmp_path, monkeypatch, capsys):
    launch_warm(monkeypatch)
    table = {
        "seeds": [0, 1],
        "shared": TINY,
        "methods": {"SimPO": ["loss.name=simpo", "loss.target_margin=1"]},
        "settings": {"flipped": ["data.noise.flip_rate=0.5"]},
    }
    recipe = recipe_for(tmp_path, small=table)
    lines = run(recipe).read_text().splitlines()
    assert lines[0] == "### small"
    assert [line.split(" | ")[:2] for line in lines[4:]] == [["| ", "SFT"], ["| flipped", "SimPO"]]
    assert lines[4].split(" | ")[3:5] == ["-", "-"]  # SFT has no gain and no preference accuracy
    assert (tmp_path / "runs" / "small.png").stat().st_size > 1000

    cell = json.loads((tmp_path / "runs" / "results.json").read_text())["small"][1]
    for seed in (0, 1):
        metrics = (
            tmp_path / "runs" / "small" / "flipped" / "SimPO" / str(seed) / "metrics.jsonl"
        ).read_text()
        last = json.loads(metrics.splitlines()[-1])
        assert cell["KL to SFT"][seed] == last["eval/kl"]
        assert "train/accuracy_flipped" in last

    # A second call looks everything up.
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")}
    assert len(before) == 2 + 2
    run(recipe)
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")} == before


def test_a_table_shows_means_intervals_paired_gains_and_what_is_not_measured():
    methods = {"DPO": [], "IPO": []}
    table = TableConfig(methods=methods, columns={"true reward": "a", "accuracy": "b"})
    rows = [
        {"setting": "", "method": "SFT", "true reward": [1.0, 2.0, 3.0], "accuracy": None},
        {"setting": "", "method": "DPO", "true reward": [2.0, 3.0, 4.0], "accuracy": [0.5, 0.5, 0.5]},
        {"setting": "", "method": "IPO", "true reward": [3.0, 4.0, 5.0], "accuracy": [0.75, 0.75, 0.75]},
    ]
    # An interval is t(0.975; 2) = 4.303 standard errors of 1/sqrt(3); by seed IPO is ahead by 1 every time.
    assert markdown("title", table, rows).splitlines() == [
        "### title",
        "",
        "| method | true reward | gain over DPO | accuracy |",
        "| --- | --- | --- | --- |",
        "| SFT | 2 ± 2.5 | - | - |",
        "| DPO | 3 ± 2.5 | - | 0.5 ± 0 |",
        "| IPO | 4 ± 2.5 | 1 ± 0 | 0.75 ± 0 |",
    ]


def test_impossible_experiments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="^tables.a.seeds must be two or more"):
        recipe_for(tmp_path, a={"seeds": [0], "methods": {"DPO": []}})
    with pytest.raises(ConfigError, match="^tables.a.methods is empty"):
        recipe_for(tmp_path, a={"methods": {}})
    with pytest.raises(ConfigError, match="^only has no table b; there are losses"):
        load_recipe(PreferenceExperimentRecipe, find_recipe("demo/preference_experiment.yaml"), ["only=[b]"])
