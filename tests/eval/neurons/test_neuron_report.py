from __future__ import annotations

import json

import numpy as np
import torch

from eval.neurons.neuron_report import load_arrays, markdown, page, plot_layers, save_arrays, save_summary
from eval.neurons.neuron_shift import NeuronShift, summarise

ARRAYS = [
    [[0.5, 0.5, -0.5], [-0.5, 0.5, 0.0]],  # cosines
    [[1.0, 1.0, -1.0], [-1.0, 1.0, 0.0]],  # alignments
    [[1.0, 1.0, -1.0], [-1.0, 2.0, 0.0]],  # alignments after
    [[4.0, -1.0, 1.0], [-2.0, 1.0, 7.0]],  # before
    [[1.0, -2.0, 2.0], [-1.0, 3.0, 8.0]],  # after
]
SHIFT = NeuronShift(*(torch.tensor(rows, dtype=torch.float64) for rows in ARRAYS))


def test_arrays_on_disk_are_those_of_the_shift(tmp_path):
    save_arrays(SHIFT, tmp_path / "neurons.npz")
    with np.load(tmp_path / "neurons.npz", allow_pickle=False) as arrays:
        assert arrays["group"].tolist() == [["TP-", "TN+", "AP+"], ["AN-", "", ""]]
        assert arrays["reductions"].tolist() == [[3.0, 1.0, 1.0], [1.0, -2.0, 0.0]]
        assert arrays["projections_before"].tolist() == [[4.0, -1.0, -1.0], [2.0, 1.0, 0.0]]
        assert arrays["projections_after"].tolist() == [[1.0, -2.0, -2.0], [1.0, 3.0, 0.0]]
        assert arrays["value_reductions"].tolist() == [[0.0, 0.0, 0.0], [0.0, -3.0, 0.0]]
    loaded = load_arrays(tmp_path / "neurons.npz")
    for name, rows in zip(NeuronShift.__dataclass_fields__, ARRAYS, strict=True):
        assert getattr(loaded, name).tolist() == rows


def test_the_tables_by_hand():
    lines = markdown(summarise(SHIFT)).splitlines()
    assert "| TP- | 2 | 1 | 3 | 50.0% | 1 | -2 | 1 |" in lines
    assert "| TN+ | 1 | 1 | 1 | 16.7% | 0 | 0 | 1 |" in lines
    assert "| all | 6 | 4 | 6 | 100.0% | 1 | -2 | 4 |" in lines
    assert "Net over gross: 0.667. The changed value vectors add -3 to the net." in lines
    assert "| 0 | 5 | 0 | 5 | 3 | 1 | 1 | 0 |" in lines  # layer, gross, opposing, net, the four groups
    assert "| 1 | 1 | -2 | -1 | 0 | 0 | 0 | 1 |" in lines
    assert (
        "| 0 | 0 | TP | 0.500 | 4 | 1 | 3 |" in lines
    )  # layer, neuron, kind, cosine, before, after, reduction
    assert lines[-1] == "| 1 | 1 | TP | 0.500 | 1 | 3 | -2 |"


def test_json_has_null_where_there_is_no_number(tmp_path):
    still = NeuronShift(*(torch.ones(1, 2, dtype=torch.float64) for _ in range(5)))
    save_summary(summarise(still), tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["groups"]["TP-"]["share"] is None and summary["total"]["balance"] is None
    assert summary["groups"]["TP-"]["neurons"] == 2 and summary["shape"] == [1, 2]
    assert "| TP- | 2 | 0 | 0 | - | 0 | 0 | 0 |" in markdown(summarise(still))


def test_the_page_says_what_was_compared(tmp_path):
    summary = {
        "policies": {"before": "sft/policy", "after": "dpo/policy"},
        "recorded_on": "own",
        "num_prompts": 9,
        "num_positions": {"before": 70, "after": 80},
        "probe": {"num_texts": 50, "accuracy": 0.9, "commoner_label": 0.5, "auc": 0.95},
        **summarise(SHIFT),
    }
    summary["total"]["noise_gross"] = 0.25
    summary["written"] = {"before": {"length": {"mean": 3.5, "change": 0.0, "half_width": 0.0}}}
    text = page(summary, ["what was read"])
    assert text.startswith("# Neurons of dpo/policy against sft/policy\n")
    assert "9 prompts, recorded on what each policy writes; 70 positions before, 80 after." in text
    assert "accuracy 0.900 (always the commoner label: 0.500), AUC 0.950" in text
    assert "about 0.25 by chance" in text and text.endswith("## Data\n\nwhat was read\n")
    assert "## What the policies write\n\n| policy | length |\n| --- | --- |\n| before | 3.500 |\n" in text
    assert "Probe on" not in page({**summary, "probe": None}, [])


def test_the_plot_is_a_picture(tmp_path):
    plot_layers(summarise(SHIFT), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
