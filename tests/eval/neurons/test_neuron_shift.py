from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

from drpo.config import ConfigError
from eval.neurons.mlp_neurons import mean_activations, mlp_output_projections
from eval.neurons.neuron_edits import patched, scaled
from eval.neurons.neuron_shift import NeuronShift, align, kind_masks, noise_gross, summarise

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
RESPONSES = [[20, 21, 1], [22, 23, 24, 25], [26, 1]]
LAYER, NEURON = 1, 37  # in the last layer, so that no other neuron reads what it writes


def shift_of(before, after, direction: torch.Tensor) -> NeuronShift:
    alignments, cosines = align(before, direction)
    means = [mean_activations(model, QUERIES, RESPONSES, batch_size=2) for model in (before, after)]
    return NeuronShift(cosines, alignments, align(after, direction)[0], *means)


def direction_of(size: int = 32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([[5, 6, 7, 8, 20, 21]])).logits


# --- one neuron moved by construction -------------------------------------------------------------------


def constant_neuron(bias: float):
    """A GPT-NeoX in which one neuron has activation gelu(bias) everywhere: no input weights, only a bias."""
    model = tiny_model("gpt_neox")
    mlp = model.gpt_neox.layers[LAYER].mlp
    with torch.no_grad():
        mlp.dense_h_to_4h.weight[NEURON] = 0.0
        mlp.dense_h_to_4h.bias[NEURON] = bias
    return model


@pytest.mark.parametrize(
    "old, new, toward, kind, group",
    [
        (2.0, 1.0, True, "TP", "TP-"),  # positive activation falls along the direction
        (1.0, -0.5, True, "TP", "TP-"),  # also through zero
        (-0.3, -0.7, True, "TN", "TN+"),  # negative activation, gelu(-0.3) = -0.115 > gelu(-0.7) = -0.169
        (1.0, 2.0, False, "AP", "AP+"),  # positive activation rises against it
        (-0.7, -0.3, False, "AN", "AN-"),
        (1.0, 2.0, True, "TP", None),  # the other way: in no group
        (-0.3, -0.7, False, "AN", None),
    ],
)
def test_exactly_the_moved_neuron_shows_up(old, new, toward, kind, group):
    before, after = constant_neuron(old), constant_neuron(new)
    direction = direction_of()
    value = before.gpt_neox.layers[LAYER].mlp.dense_4h_to_h.weight[:, NEURON].tolist()
    dot = sum(v * w for v, w in zip(value, direction.tolist(), strict=True))
    if (dot > 0) != toward:
        direction, dot = -direction, -dot
    length = math.sqrt(sum(float(w) ** 2 for w in direction))

    shift = shift_of(before, after, direction)

    moved = (gelu(old) - gelu(new)) * dot / length
    expected = np.zeros((2, 64))
    expected[LAYER, NEURON] = moved
    np.testing.assert_allclose(shift.reductions, expected, rtol=0, atol=3e-6)
    assert shift.before[LAYER, NEURON].item() == pytest.approx(gelu(old), abs=1e-6)
    assert shift.projections_after[LAYER, NEURON].item() == pytest.approx(gelu(new) * dot / length, abs=1e-5)
    assert not shift.value_reductions.any()
    for name, mask in shift.group_masks().items():
        large = mask & (shift.reductions.abs() > 1e-4)
        assert large.nonzero().tolist() == ([[LAYER, NEURON]] if name == group else [])
    top = summarise(shift)["top"]["away from" if group else "toward"][0]
    assert (top["layer"], top["neuron"], top["kind"]) == (LAYER, NEURON, kind)
    assert top["reduction"] == pytest.approx(moved, abs=3e-6)


def test_patching_the_moved_neuron_to_its_mean_after_gives_the_moved_model():
    before, after = constant_neuron(2.0), constant_neuron(-1.0)
    shift = shift_of(before, after, direction_of())
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[LAYER, NEURON] = True
    assert (logits_of(before) - logits_of(after)).abs().max() > 0.1
    with patched(before, shift.after, mask):
        torch.testing.assert_close(logits_of(before), logits_of(after), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(before), logits_of(after), atol=0.1)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen2", "qwen3"])
def test_a_gated_neuron_that_is_made_stronger(model_type):
    """Its row of up_proj times 3: its activation is 3 times as large everywhere, all others are as before."""
    before = tiny_model(model_type)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.model.layers[LAYER].mlp.up_proj.weight[NEURON] *= 3
    shift = shift_of(before, after, direction_of())
    expected = torch.zeros(2, 64, dtype=torch.float64)
    expected[LAYER, NEURON] = -2 * shift.before[LAYER, NEURON] * shift.alignments[LAYER, NEURON]
    torch.testing.assert_close(shift.reductions, expected, rtol=1e-5, atol=1e-6)
    factors = torch.ones(2, 64)
    factors[LAYER, NEURON] = 3.0
    with scaled(before, factors):
        torch.testing.assert_close(logits_of(before), logits_of(after), rtol=0, atol=1e-4)


def test_a_moved_value_vector_is_told_apart_from_a_moved_activation():
    before = tiny_model("gpt2")
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.transformer.h[LAYER].mlp.c_proj.weight[NEURON] += 1.0
    direction = direction_of()
    shift = shift_of(before, after, direction)
    assert not shift.reductions.any()
    expected = torch.zeros_like(shift.before)
    expected[LAYER, NEURON] = (
        -shift.before[LAYER, NEURON] * direction.double().sum() / direction.double().norm()
    )
    torch.testing.assert_close(shift.value_reductions, expected, rtol=1e-6, atol=1e-9)
    assert summarise(shift)["total"]["value_vectors"] == pytest.approx(float(expected.sum()))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_projections_sum_to_that_of_what_the_mlps_write(model_type):
    """Sum over neurons of p = (mean output of the projection - its bias) . w / |w|, row by row without padding."""
    model = tiny_model(model_type)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(4))
    shift = shift_of(model, model, direction)
    totals = np.zeros(2)
    for layer, projection in enumerate(mlp_output_projections(model)):
        bias = 0.0 if getattr(projection, "bias", None) is None else projection.bias.detach()
        for query, response in zip(QUERIES, RESPONSES, strict=True):
            seen = []
            handle = projection.register_forward_hook(lambda m, inputs, output, s=seen: s.append(output))
            with torch.no_grad():
                model(input_ids=torch.tensor([query + response]))
            handle.remove()
            written = (seen[0].reshape(len(query) + len(response), -1) - bias)[len(query) - 1 : -1]
            totals[layer] += float((written @ direction).sum() / direction.norm())
    np.testing.assert_allclose(
        shift.projections_before.sum(dim=1), totals / sum(map(len, RESPONSES)), rtol=1e-4, atol=1e-5
    )


# --- alignment ------------------------------------------------------------------------------------------


def test_alignment_and_cosine_by_hand():
    model = tiny_model("gpt2", n_embd=2, n_head=1, n_layer=1, n_inner=3)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]]))
    alignments, cosines = align(model, torch.tensor([0.0, 5.0]))
    assert alignments.tolist() == [[4.0, -2.0, 0.0]]
    assert cosines.tolist() == [[0.8, -1.0, 0.0]]


def test_a_direction_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(16,\), but the MLPs of .* write vectors of 32"):
        align(tiny_model("gpt_neox"), torch.ones(16))
    with pytest.raises(ValueError, match="norm 0.0"):
        align(tiny_model("gpt_neox"), torch.zeros(32))


# --- groups and sums ------------------------------------------------------------------------------------


def made_shift(cosines, before, after) -> NeuronShift:
    """Alignment = cosine, that is value vectors of length 1."""
    arrays = [torch.tensor(rows, dtype=torch.float64) for rows in (cosines, cosines, cosines, before, after)]
    return NeuronShift(*arrays)


# Layer 0 has one neuron of each group and a TP that moves the other way, layer 1 one of each of the other moves.
SHIFT = made_shift(
    cosines=[[0.5, 0.5, -0.5, -0.5, 0.5], [0.5, -0.5, -0.5, 0.0, 0.5]],
    before=[[1.0, -1.0, 1.0, -1.0, 2.0], [-1.0, 1.0, -1.0, 3.0, 0.0]],
    after=[[0.4, -1.4, 1.2, -0.8, 3.0], [-0.6, 0.0, -3.0, 9.0, 0.0]],
)


def test_kinds_groups_and_sums_by_hand():
    reductions = [[0.3, 0.2, 0.1, 0.1, -0.5], [-0.2, -0.5, -1.0, 0.0, 0.0]]
    np.testing.assert_allclose(SHIFT.reductions, reductions)
    kinds = {name: mask.nonzero().tolist() for name, mask in kind_masks(SHIFT.cosines, SHIFT.before).items()}
    assert kinds == {
        "TP": [[0, 0], [0, 4], [1, 4]],  # activation 0 counts as positive
        "TN": [[0, 1], [1, 0]],
        "AP": [[0, 2], [1, 1]],
        "AN": [[0, 3], [1, 2]],
    }
    groups = {name: mask.nonzero().tolist() for name, mask in SHIFT.group_masks().items()}
    assert groups == {"TP-": [[0, 0]], "TN+": [[0, 1]], "AP+": [[0, 2]], "AN-": [[0, 3]]}

    summary = summarise(SHIFT)
    rows = {
        name: [
            row[key] for key in ("neurons", "count", "gross", "opposing_count", "opposing", "net", "share")
        ]
        for name, row in summary["groups"].items()
    }
    assert rows == {
        "TP-": pytest.approx([3, 1, 0.3, 1, -0.5, -0.2, 3 / 7]),
        "TN+": pytest.approx([2, 1, 0.2, 1, -0.2, 0.0, 2 / 7], abs=1e-12),
        "AP+": pytest.approx([2, 1, 0.1, 1, -0.5, -0.4, 1 / 7]),
        "AN-": pytest.approx([2, 1, 0.1, 1, -1.0, -0.9, 1 / 7]),
    }
    total = summary["total"]
    assert total["gross"] == pytest.approx(0.7)
    assert total["opposing"] == pytest.approx(-2.2)
    assert total["net"] == pytest.approx(-1.5)
    assert total["balance"] == pytest.approx(-1.5 / 0.7)
    assert (total["neurons"], total["count"], total["opposing_count"]) == (10, 4, 4)
    layers = summary["layers"]
    assert layers["gross"] == pytest.approx([0.7, 0.0])
    assert layers["opposing"] == pytest.approx([-0.5, -1.7])
    assert layers["net"] == pytest.approx([0.2, -1.7])
    assert layers["AN-"] == pytest.approx([0.1, 0.0])


def test_sums_reconcile_on_random_neurons():
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(4, 200, generator=generator, dtype=torch.float64) for _ in range(5)]
    arrays[1] = arrays[0] * arrays[1].abs()  # alignments have the signs of the cosines
    shift = NeuronShift(*arrays)
    summary = summarise(shift)
    total, layers, groups = summary["total"], summary["layers"], summary["groups"].values()
    change = float((shift.after * shift.alignments_after).sum() - (shift.before * shift.alignments).sum())
    assert total["net"] + total["value_vectors"] == pytest.approx(
        -change
    )  # what really changed, and nothing else
    assert total["gross"] + total["opposing"] == pytest.approx(total["net"])
    for key in ("gross", "opposing", "net"):
        assert sum(layers[key]) == pytest.approx(total[key])
        assert sum(group[key] for group in groups) == pytest.approx(total[key])
    for layer in range(4):
        in_groups = sum(layers[name][layer] for name in ("TP-", "TN+", "AP+", "AN-"))
        assert in_groups == pytest.approx(layers["gross"][layer])
    assert sum(group["share"] for group in groups) == pytest.approx(1.0)
    assert sum(group["count"] + group["opposing_count"] for group in groups) == 800


def test_the_published_sums_of_gpt2_medium():
    """Yang et al. 2024, first version: sums of the four groups, and shares of 31.8, 23.9, 7.0 and 37.3 percent;
    neurons that move the other way sum to -40.27, so the net is a seventh of the gross."""
    # One neuron of each group, and one that opposes.
    shift = made_shift(
        cosines=[[1.0, 1.0, -1.0, -1.0, -1.0]],
        before=[[20.0, -1.0, 1.0, -20.0, 50.0]],
        after=[[20.0 - 15.11, -1.0 - 11.34, 1.0 + 3.32, -20.0 + 17.72, 50.0 - 40.27]],
    )
    summary = summarise(shift)
    assert [round(100 * group["share"], 1) for group in summary["groups"].values()] == [31.8, 23.9, 7.0, 37.3]
    assert summary["total"]["gross"] == pytest.approx(47.48, abs=0.02)
    assert summary["total"]["net"] == pytest.approx(7.22, abs=0.02)


def test_a_policy_against_itself_has_no_shares():
    model = tiny_model("gpt_neox")
    summary = summarise(shift_of(model, model, direction_of()))
    assert summary["total"]["gross"] == summary["total"]["opposing"] == 0
    assert all(math.isnan(group["share"]) for group in summary["groups"].values())
    assert math.isnan(summary["total"]["balance"])
    assert summary["top"] == {"away from": [], "toward": []}


def test_sampling_noise_by_simulation():
    """Two samples of one policy, 64 positions each, against the two halves of one sample of 64."""
    rng = np.random.default_rng(0)
    alignments = torch.from_numpy(rng.normal(size=(1, 20000)))
    draws = rng.normal(size=(3, 64, 20000)) * rng.uniform(0.1, 3, size=20000)
    gross = float(((torch.from_numpy(draws[0].mean(0) - draws[1].mean(0))) * alignments).clamp(min=0).sum())
    halves = [torch.from_numpy(draws[2, part::2].mean(axis=0))[None] for part in (0, 1)]
    assert noise_gross(*halves, alignments) == pytest.approx(gross, rel=0.05)


def test_arrays_of_unequal_shape_are_refused():
    with pytest.raises(ValueError, match="same architecture"):
        NeuronShift(*[torch.zeros(2, 3)] * 4, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cosines have shape"):
        kind_masks(torch.zeros(2, 3), torch.zeros(2, 4))
