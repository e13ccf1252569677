from __future__ import annotations

import math

import pytest
import torch
from sampled import generate
from tiny_models import tiny_model

from drpo.rollout.sampler import SamplingConfig
from eval.neurons.neuron_edits import EditConfig, intervene, tuning_free_factors
from eval.neurons.neuron_report import mean_and_half, written_markdown, written_summary
from eval.neurons.neuron_shift import NeuronShift

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def continuations_of(model) -> list[list[int]]:
    return generate(
        model,
        PROMPTS,
        [6] * 3,
        torch.zeros(3, 6, dtype=torch.float64),
        sampling=SamplingConfig(temperature=0),
        stop_ids=[],
        batch_size=3,
    )


def one_moved_neuron(model, after: float) -> NeuronShift:
    """Neuron 37 of the last layer moves to `after`, along the direction it writes to; the others stay."""
    generator = torch.Generator().manual_seed(0)
    cosines = 0.1 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    before = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    cosines[1, 37], before[1, 37] = 0.9, 1.0
    moved = before.clone()
    moved[1, 37] = after
    return NeuronShift(cosines, cosines, cosines, before, moved)


def test_each_group_is_patched_by_itself_and_the_model_is_left_as_it_was():
    """The patched neuron is overwritten by hand: an MLP whose output projection reads a constant there."""
    model = tiny_model("gpt_neox")
    plain = continuations_of(model)
    found = intervene(
        model, one_moved_neuron(model, after=-8.0), EditConfig(), lambda: continuations_of(model)
    )
    assert list(found) == [
        "before, TP- patched",
        "before, all four patched",
        "before, edited without training",
    ]
    assert continuations_of(model) == plain

    mlp = model.gpt_neox.layers[1].mlp
    with torch.no_grad():  # activation a -> contribution -8 v instead of a v, at every position
        value = mlp.dense_4h_to_h.weight[:, 37].clone()
        mlp.dense_4h_to_h.weight[:, 37] = 0.0
        mlp.dense_4h_to_h.bias += -8.0 * value
    by_hand = continuations_of(model)
    assert by_hand != plain
    assert found["before, TP- patched"] == found["before, all four patched"] == by_hand


def test_the_edit_is_the_one_of_its_section():
    """A neuron scaled by f is one whose value vector is scaled by f."""
    model = tiny_model("gpt_neox")
    shift = one_moved_neuron(model, after=1.0)
    edit = EditConfig(alpha=0.9, fraction=1.0)
    found = intervene(model, shift, edit, lambda: continuations_of(model))
    assert list(found) == ["before, edited without training"]  # nothing moved: no group to patch
    factors = tuning_free_factors(shift.cosines, shift.before, 0.9, 1.0).float()
    with torch.no_grad():
        for layer in range(2):
            model.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight *= factors[layer]
    assert found["before, edited without training"] == continuations_of(model)


@pytest.mark.parametrize("name", ["alpha", "fraction", "skip_most_active"])
def test_the_edit_is_checked(name):
    with pytest.raises(ValueError, match=f"^{name} must be >= 0 and <= 1, got -0.1"):
        EditConfig(**{name: -0.1})


def test_mean_and_interval_leave_out_what_is_missing():
    # 1, 2, 3: mean 2, standard deviation 1, 1.96 / sqrt(3)
    assert mean_and_half([1.0, math.nan, 2.0, 3.0]) == pytest.approx((2.0, 1.96 / math.sqrt(3)))
    mean, half = mean_and_half([math.nan, 5.0])
    assert mean == 5.0 and math.isnan(half)
    assert math.isnan(mean_and_half([math.nan])[0])


def test_changes_are_paired_by_prompt():
    measured = {
        "before": {"score": [1.0, 10.0, 100.0, 5.0]},
        "patched": {"score": [2.0, 11.0, 101.0, math.nan]},  # 1 more on every prompt that has both
    }
    summary = written_summary(measured)
    assert summary["before"]["score"]["mean"] == 29.0
    assert summary["patched"]["score"] == {"mean": 38.0, "change": 1.0, "half_width": 0.0}
    assert written_markdown(summary).splitlines() == [
        "| policy | score |",
        "| --- | --- |",
        "| before | 29.000 |",
        "| patched | 38.000 (+1.000 ± 0.000) |",
    ]
