from __future__ import annotations

import numpy as np
import pytest
import torch
from sampled import generate
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from drpo.rollout.sampler import SamplingConfig
from eval.neurons.mlp_neurons import mlp_output_projections, num_neurons, value_vectors
from eval.neurons.neuron_edits import patched, scaled, tuning_free_factors

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids).logits


@torch.no_grad()
def inputs_of(model, layer: int, ids=IDS) -> torch.Tensor:
    """What enters the output projection of a layer, (B, T, d_mlp), hooks of the model included."""
    seen = []
    projection = mlp_output_projections(model)[layer]
    handle = projection.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
    model(input_ids=ids)
    handle.remove()
    return [tensor.reshape(*ids.shape, -1) for tensor in seen[0]]


def values_and_mask(model, neurons: dict[tuple[int, int], float]):
    values, mask = torch.full(num_neurons(model), 9.9), torch.zeros(num_neurons(model), dtype=torch.bool)
    for (layer, neuron), value in neurons.items():
        values[layer, neuron], mask[layer, neuron] = value, True
    return values, mask


# --- which neurons and which positions -------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "last", "mask"])
def test_the_chosen_neurons_at_the_chosen_positions_and_no_others(model_type, positions):
    model = tiny_model(model_type)
    values, mask = values_and_mask(model, {(1, 3): 2.5, (1, 40): -1.0})
    plain, plain_output = inputs_of(model, 1)
    where = torch.zeros(2, 5, dtype=torch.bool)
    match positions:
        case "all":
            where[:] = True
        case "last":
            where[:, 4] = True
        case "mask":
            where[0, 2] = where[1, 0] = where[1, 3] = True
            positions = where
    with patched(model, values, mask, positions):
        changed, output = inputs_of(model, 1)
    expected = plain.clone()
    for row, column in where.nonzero().tolist():
        expected[row, column, 3], expected[row, column, 40] = 2.5, -1.0
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)
    # What the projection writes differs by the change of activation times the value vector.
    vectors = value_vectors(mlp_output_projections(model)[1])
    written = (expected - plain)[..., 3:4] * vectors[3] + (expected - plain)[..., 40:41] * vectors[40]
    torch.testing.assert_close(output - plain_output, written, rtol=0, atol=1e-5)


def test_positions_before_the_first_patched_one_keep_their_logits():
    model = tiny_model("llama")
    values, mask = values_and_mask(model, {(0, 3): 4.0})
    where = torch.tensor([[False, False, True, False, False], [False, False, False, False, True]])
    plain = logits_of(model)
    with patched(model, values, mask, where):
        changed = logits_of(model)
    moved = (changed - plain).abs().amax(dim=-1) > 1e-4
    assert moved.tolist() == [[False, False, True, True, True], [False, False, False, False, True]]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_last_in_cached_generation_is_the_last_prompt_token_and_every_new_token(model_type):
    """Unequal prompts, cached and left-padded, against whole rows scored one by one with a mask."""
    model = tiny_model(model_type)
    values, mask = values_and_mask(model, {(0, 3): 3.0, (1, 10): -3.0})
    prompts, num_new = [[5, 6, 7, 8], [9, 10]], 5
    uniforms = torch.zeros(2, num_new, dtype=torch.float64)
    with patched(model, values, mask, "last"):
        found = generate(
            model,
            prompts,
            [num_new] * 2,
            uniforms,
            sampling=SamplingConfig(temperature=0),
            stop_ids=[],
            batch_size=2,
        )
    changed = 0
    for prompt, response in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in response:
            where = torch.zeros(1, len(text), dtype=torch.bool)
            where[0, len(prompt) - 1 :] = True
            with patched(model, values, mask, where):
                assert int(logits_of(model, torch.tensor([text]))[0, -1].argmax()) == token
            changed += int(logits_of(model, torch.tensor([text]))[0, -1].argmax()) != token
            text.append(token)
    assert changed  # the patch does something


def test_an_earlier_layer_that_is_not_patched_is_as_it_was():
    model = tiny_model("gpt_neox")
    values, mask = values_and_mask(model, {(1, 3): 2.5})
    plain, _ = inputs_of(model, 0)
    with patched(model, values, mask):
        assert torch.equal(inputs_of(model, 0)[0], plain)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "gemma2", "mistral"])
def test_scaling_is_a_scaled_weight(model_type):
    """a -> f a is the same model as v -> f v."""
    model = tiny_model(model_type)
    factors = 1 + 0.5 * torch.randn(num_neurons(model), generator=torch.Generator().manual_seed(1))
    with scaled(model, factors):
        found = logits_of(model)
    plain = logits_of(model)
    with torch.no_grad():
        for layer, projection in enumerate(mlp_output_projections(model)):
            by_row = model_type == "gpt2"
            projection.weight.mul_(factors[layer].unsqueeze(1) if by_row else factors[layer])
    torch.testing.assert_close(found, logits_of(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


def test_contexts_nest_and_keep_the_precision_of_the_model():
    model = tiny_model("gpt_neox").to(torch.bfloat16)
    values, mask = values_and_mask(model, {(0, 3): 3.0})
    with scaled(model, torch.full(num_neurons(model), 2.0)), patched(model, values, mask):
        inside, _ = inputs_of(model, 0)
    assert inside.dtype == torch.bfloat16
    assert (inside[..., 3] == 3.0).all()  # patched after it was scaled
    torch.testing.assert_close(inside[..., 4], 2 * inputs_of(model, 0)[0][..., 4])


# --- hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["patched", "scaled"])
def test_hooks_are_gone_afterwards_also_after_an_error(edit):
    model = tiny_model("gpt2")
    values, mask = values_and_mask(model, {(0, 3): 3.0, (1, 4): 1.0})
    plain = logits_of(model)

    def context():
        return patched(model, values, mask) if edit == "patched" else scaled(model, values)

    with context():
        assert hook_count(model) == 3  # two layers, and the embedding that tells rows and columns
    assert hook_count(model) == 0 and torch.equal(logits_of(model), plain)
    with pytest.raises(KeyError), context():
        raise KeyError("in the middle")
    assert hook_count(model) == 0 and torch.equal(logits_of(model), plain)


def test_a_forward_of_another_shape_is_refused_and_leaves_no_hook():
    model = tiny_model(
        "opt"
    )  # its MLPs see rows and columns flattened: (5, 2) has as many positions as (2, 5)
    values, mask = values_and_mask(model, {(0, 3): 3.0})
    where = torch.ones(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"positions cover \(5, 2\).*this forward has \(2, 5\)"):
        with patched(model, values, mask, where):
            logits_of(model)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"values": torch.zeros(3, 64)}, r"values has shape \(3, 64\); this model has \(2, 64\)"),
        ({"neuron_mask": torch.zeros(2, 64)}, "neuron_mask must be bool"),
        ({"neuron_mask": torch.zeros(2, 60, dtype=torch.bool)}, "neuron_mask has shape"),
        ({"positions": "first"}, "positions must be 'all', 'last' or a bool mask"),
        ({"positions": torch.zeros(2, 5)}, "positions must be bool"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    model = tiny_model("gpt_neox")
    good = {"values": torch.zeros(2, 64), "neuron_mask": torch.zeros(2, 64, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        with patched(model, **{**good, **arguments}):
            pass


# --- tuning-free editing --------------------------------------------------------------------------------


def test_factors_by_hand():
    """Four neurons of each kind; |cos| 0.1, 0.2, 0.3, 0.4. Half of TP and AN from the top, of AP and TN from below."""
    size = [0.1, 0.2, 0.3, 0.4]
    cosines = torch.tensor([size, size, [-x for x in size], [-x for x in size]])  # T, T, A, A
    activations = torch.tensor([[1.0] * 4, [-1.0] * 4, [1.0] * 4, [-1.0] * 4])  # TP, TN, AP, AN
    factors = tuning_free_factors(cosines, activations, alpha=0.05)
    np.testing.assert_allclose(
        factors, [[1, 1, 0.95, 0.95], [1.05, 1.05, 1, 1], [1.05, 1.05, 1, 1], [1, 1, 0.95, 0.95]]
    )


def test_the_most_active_neurons_are_left_alone():
    """8 TP neurons; the top quarter by |activation| (the last two) is out, half of the other six is scaled."""
    cosines = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    activations = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 9.0]])
    factors = tuning_free_factors(cosines, activations, alpha=0.5, skip_most_active=0.25)
    np.testing.assert_allclose(factors, [[1, 1, 1, 0.5, 0.5, 0.5, 1, 1]])


def test_shares_that_are_a_whole_number_of_neurons_are_that_number():
    """0.29 of 100 neurons are 29, and 28.999999999999996 in floating point."""
    cosines, activations = torch.linspace(0.01, 1, 100)[None], torch.ones(1, 100)
    factors = tuning_free_factors(cosines, activations, alpha=0.5, fraction=0.29)
    np.testing.assert_allclose(factors, [[1.0] * 71 + [0.5] * 29])
    left_alone = tuning_free_factors(cosines, activations, alpha=0.5, fraction=1.0, skip_most_active=0.29)
    assert int((left_alone == 1).sum()) == 29


def test_editing_lowers_the_projection_of_an_mlp_on_the_probe_direction():
    """Whatever the signs, each scaled neuron moves the projection down: that is what the four rules are for."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(2, 50, generator=generator)
    activations = torch.randn(2, 50, generator=generator)
    factors = tuning_free_factors(cosines, activations, alpha=0.1)
    change = (factors - 1) * activations * cosines
    assert (change <= 0).all() and int((change < 0).sum()) in range(46, 51)


@pytest.mark.parametrize("name", ["alpha", "fraction", "skip_most_active"])
def test_shares_outside_0_and_1_are_refused(name):
    with pytest.raises(ValueError, match=name):
        tuning_free_factors(torch.ones(1, 2), torch.ones(1, 2), **{name: 1.5})
