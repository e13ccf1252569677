"""The row of resets.jsonl, by hand, and the rows that a run writes."""

from __future__ import annotations

import json

from hand_rollouts import hand_trajectory
from online_runs import run_online

from drpo.trainers.drawn_resets import drawn_resets


def test_lengths_and_fractions_are_counts():
    """h / L: none, 1/10, 2/10, 3/10, 1/3, 11/12, 9/10 and 10/10."""
    forced, sources = [0, 1, 2, 3, 1, 11, 9, 10], [0, 10, 10, 10, 3, 12, 10, 10]
    rollouts = hand_trajectory(
        lengths=[12] * 8, forced=forced, width=12, source_lengths=sources, scores=[0.0] * 8
    )
    row = drawn_resets(rollouts)
    assert list(row["lengths"].items()) == [
        ("0", 1),
        ("1", 2),
        ("2", 1),
        ("3", 1),
        ("9", 1),
        ("10", 1),
        ("11", 1),
    ]
    assert row["fractions"] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 2]


def test_an_edge_belongs_to_the_bin_below_it():
    forced, sources = [7, 70, 71], [10, 100, 100]
    rollouts = hand_trajectory(lengths=[100] * 3, forced=forced, width=100, source_lengths=sources)
    assert drawn_resets(rollouts)["fractions"][7:9] == [2, 1]


def test_a_run_writes_a_row_a_step(policy_folder, tmp_path):
    metrics = run_online(policy_folder, tmp_path / "run", {"reset": {"proportion": 0.5}})
    rows = [json.loads(line) for line in (tmp_path / "run" / "resets.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in metrics] == [1, 2, 3]
    for row, step in zip(rows, metrics, strict=True):
        lengths = {int(h): count for h, count in row["lengths"].items()}
        assert sum(lengths.values()) == sum(row["fractions"]) == 16
        assert row["fractions"][0] == lengths[0] == 16 * (1 - step["reset/share"])
        mean = sum(h * count for h, count in lengths.items()) / (16 - lengths[0])
        assert abs(mean - step["reset/prefix_length"]) < 1e-5


def test_a_run_without_resets_writes_none(policy_folder, tmp_path):
    run_online(policy_folder, tmp_path / "run", {"num_steps": 1, "reset": {"proportion": 0.0}})
    assert not (tmp_path / "run" / "resets.jsonl").exists()
