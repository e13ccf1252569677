"""The whole analysis on policies of a few thousand weights: a moved neuron is found, written down and patched."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError, load_recipe
from drpo.data.holdout import is_held_out
from eval.neurons.analyse import NeuronShiftRecipe
from eval.neurons.analyse import neuron_shift as run

LAYER, NEURON = 1, 13  # the last layer of two: no neuron reads what it writes
NUM_NEW = 5
RECIPE = {
    "data": {"task": "demo", "demo": {"num_train": 24, "num_eval": 6}},
    "num_prompts": 5,
    "num_new_tokens": NUM_NEW,
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def moved_folder(policy_folder, tmp_path_factory) -> Path:
    """The saved policy, and in `after` the same with one neuron's input bias raised."""
    folder = tmp_path_factory.mktemp("moved")
    for name, bias in (("before", -0.4), ("after", 1.5)):
        shutil.copytree(policy_folder, folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        mlp = model.gpt_neox.layers[LAYER].mlp
        with torch.no_grad():
            mlp.dense_h_to_4h.weight[NEURON] = 0.0
            mlp.dense_h_to_4h.bias[NEURON] = bias
        model.save_pretrained(folder / name)
    return folder


def analyse(folder: Path, run_dir: Path, **changes) -> Path:
    recipe = {
        **RECIPE,
        "before": str(folder / "before"),
        "after": str(folder / "after"),
        "run_dir": str(run_dir),
    }
    return run(
        load_recipe(NeuronShiftRecipe, write_recipe(run_dir.with_suffix(".yaml"), {**recipe, **changes}), [])
    )


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def test_the_moved_neuron_is_found_on_common_text(moved_folder, tmp_path):
    result = analyse(moved_folder, tmp_path / "run", continuations="before")
    assert result == tmp_path / "run" / "summary.md"
    names = {path.name for path in result.parent.iterdir()}
    assert names == {
        "summary.md",
        "summary.json",
        "neurons.npz",
        "probe.npz",
        "layers.png",
        "config.yaml",
    }

    with np.load(result.parent / "probe.npz") as saved:
        weight = saved["weight"]
    model = AutoModelForCausalLM.from_pretrained(moved_folder / "before")
    value = model.gpt_neox.layers[LAYER].mlp.dense_4h_to_h.weight[:, NEURON].detach().double().numpy()
    moved = (gelu(-0.4) - gelu(1.5)) * (value @ weight) / np.linalg.norm(weight)
    expected = np.zeros((2, 64))
    expected[LAYER, NEURON] = moved
    with np.load(result.parent / "neurons.npz") as arrays:
        np.testing.assert_allclose(arrays["reductions"], expected, rtol=0, atol=1e-6)
        assert not arrays["value_reductions"].any()
    summary = json.loads((result.parent / "summary.json").read_text())
    assert summary["total"]["net"] == pytest.approx(moved, abs=1e-5)
    assert summary["num_prompts"] == 5
    # Both were recorded on the same tokens.
    assert summary["num_positions"]["before"] == summary["num_positions"]["after"] <= 5 * NUM_NEW
    text = result.read_text()
    assert "fitted on" in text and "## What the policies write" in text


def test_patching_the_group_of_the_moved_neuron_gives_the_continuations_of_the_moved_policy(
    moved_folder, tmp_path
):
    """Prompt positions keep the old activation, which in the last layer reaches no other position."""
    summaries = []
    for seed in range(2):  # along the direction or against it the neuron must be in a group: turn the probe
        probe = np.zeros(32)
        model = AutoModelForCausalLM.from_pretrained(moved_folder / "before")
        value = model.gpt_neox.layers[LAYER].mlp.dense_4h_to_h.weight[:, NEURON].detach().numpy()
        probe[:] = value if seed else -value
        np.save(tmp_path / f"probe{seed}.npy", probe)
        result = analyse(
            moved_folder,
            tmp_path / f"run{seed}",
            probe={"source": "file", "path": str(tmp_path / f"probe{seed}.npy")},
            continuations="before",
            reward_functions={"token_sum": "neuron_rewards:token_sum"},
        )
        summaries.append(json.loads((result.parent / "summary.json").read_text()))
    against, along = summaries
    # Negative activation rose: against the direction that is AN-, along it no reduction at all.
    assert against["groups"]["AN-"]["gross"] == pytest.approx(
        (gelu(1.5) - gelu(-0.4)) * np.linalg.norm(value), rel=1e-4
    )
    assert along["total"]["gross"] < 1e-4 < -along["total"]["opposing"]
    rows = against["written"]
    patched = rows["before, AN- patched"]
    assert patched["token_sum"]["mean"] == rows["after"]["token_sum"]["mean"]
    assert patched["length"]["mean"] == rows["after"]["length"]["mean"]
    assert patched["probe_logit"]["mean"] == pytest.approx(rows["after"]["probe_logit"]["mean"])
    assert rows["after"]["token_sum"]["mean"] != rows["before"]["token_sum"]["mean"]


def test_each_policy_is_recorded_on_what_it_writes(moved_folder, tmp_path):
    """The moved neuron's activation is the same on any text; the others' differ, since the texts do."""
    arrays = {}
    for continuations in ("own", "before"):
        result = analyse(
            moved_folder, tmp_path / continuations, continuations=continuations, interventions=False
        )
        with np.load(result.parent / "neurons.npz") as saved:
            arrays[continuations] = {name: saved[name] for name in ("before", "after")}
    own, common = arrays["own"], arrays["before"]
    for name, bias in (("before", -0.4), ("after", 1.5)):
        assert own[name][LAYER, NEURON] == pytest.approx(gelu(bias), abs=1e-6)
    assert np.array_equal(own["before"], common["before"])
    others = np.arange(64) != NEURON
    assert np.abs(common["after"] - common["before"])[:, others].max() < 1e-6
    assert np.abs(own["after"] - own["before"])[:, others].max() > 1e-2


def test_a_policy_against_itself_on_its_own_continuations_did_not_move(moved_folder, tmp_path):
    result = analyse(
        moved_folder,
        tmp_path / "run",
        after=str(moved_folder / "before"),
        interventions=False,
        sampling={"temperature": 1.0},
    )
    summary = json.loads((result.parent / "summary.json").read_text())
    assert summary["total"]["gross"] < 1e-6
    assert summary["total"]["noise_gross"] > 1e-4  # halves of the prompts do differ
    assert list(summary["written"]) == ["before", "after"]


def test_the_probe_that_a_run_leaves_can_be_given_to_another(moved_folder, tmp_path):
    first = analyse(moved_folder, tmp_path / "first", interventions=False).parent
    again = {"source": "file", "path": str(first / "probe.npz")}
    second = analyse(moved_folder, tmp_path / "second", interventions=False, probe=again).parent
    with np.load(first / "neurons.npz") as a, np.load(second / "neurons.npz") as b:
        assert a.files == b.files
        for name in a.files:
            assert np.array_equal(a[name], b[name])


def test_the_probe_is_fitted_by_the_policy_before_on_texts_that_it_is_not_tested_on(moved_folder, tmp_path):
    """The gradient of the regression vanishes on the texts to fit on, summed by a loop, and not on the others."""
    rows = [{"text": f"item {i} {('rope', 'lamp')[i % 2]}", "label": bool(i % 2)} for i in range(50)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    probe = {"source": "texts", "path": str(tmp_path / "texts.jsonl"), "holdout": 0.4}
    run_dir = analyse(moved_folder, tmp_path / "run", interventions=False, probe=probe).parent
    with np.load(run_dir / "probe.npz") as saved:
        weight, bias = saved["weight"], float(saved["bias"])

    model = AutoModelForCausalLM.from_pretrained(moved_folder / "before")
    tokenizer = AutoTokenizer.from_pretrained(moved_folder / "before")
    gradients, counts = (
        {False: weight.copy(), True: weight.copy()},
        {False: 0, True: 0},
    )  # of the penalty: l2 = 1
    for row in rows:
        with torch.no_grad():
            ids = tokenizer(row["text"], return_tensors="pt").input_ids
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(dim=0).numpy()
        held_out = is_held_out(row["text"], 0.4, 0)
        gradients[held_out] += (1 / (1 + math.exp(-(hidden @ weight + bias))) - row["label"]) * hidden
        counts[held_out] += 1
    assert np.abs(gradients[False]).max() < 1e-4 < 1e-2 < np.abs(gradients[True]).max()
    assert json.loads((run_dir / "summary.json").read_text())["probe"]["num_texts"] == counts[True] > 5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"before": None}, "before must name a policy"),
        ({"after": None}, "after must name a policy"),
        ({"after": "./nowhere/policy"}, "after: no folder './nowhere/policy'"),
        ({"num_prompts": 1}, "num_prompts must be >= 2"),
        ({"data": {"task": "tldr", "path": "x"}}, "probe.source can be demo for data.task=demo only"),
        ({"interventions": False, "edit": {"alpha": 0.1}}, "edit does not apply to interventions=false"),
        (
            {"reward_functions": {"length": "b:c"}},
            "reward_functions.length is the name of another measurement",
        ),
        ({"reward_functions": {"mine": "nothing:score"}}, "reward_functions.mine"),
        ({"edit": {"alpha": 2.0}}, "edit.alpha must be >= 0 and <= 1, got 2"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(changes, message, moved_folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        analyse(moved_folder, tmp_path / "run", **changes)


def test_policies_that_cannot_be_compared_are_refused(moved_folder, policy_folder, tmp_path):
    other = tmp_path / "wider"
    shutil.copytree(policy_folder, other)
    config = AutoModelForCausalLM.from_pretrained(other).config
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"after: \(2, 48\) .*, but before has \(2, 64\)"):
        analyse(moved_folder, tmp_path / "run", after=str(other))

    tokenizer = json.loads((policy_folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="has another vocabulary"):
        analyse(moved_folder, tmp_path / "run", after=str(other))
