from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError
from drpo.tensors import pad_batch
from eval.neurons.mlp_neurons import (
    emitting_mask,
    mean_activations,
    mlp_output_projections,
    num_neurons,
    pre_hooks,
    value_vectors,
)

every_architecture = pytest.mark.parametrize("model_type", [*ARCHITECTURES, "gemma"])
QUERIES = [[5, 6, 7, 8], [9], [10, 11, 12], [3, 4]]
RESPONSES = [[20, 21], [22, 23, 24, 1], [], [25]]


def small_model(model_type: str):
    if model_type == "gemma":
        config = AutoConfig.for_model("gemma", vocab_size=61, head_dim=8, **ARCHITECTURES["llama"])
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()
    return tiny_model(model_type)


# --- value vectors --------------------------------------------------------------------------------------


def test_value_vectors_of_both_weight_layouts():
    """3 neurons, 2 numbers: neuron 1 active alone must write value vector 1 (and the bias)."""
    wanted = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    linear, conv = nn.Linear(3, 2), Conv1D(2, 3)
    with torch.no_grad():
        linear.weight.copy_(wanted.T)
        conv.weight.copy_(wanted)
        for projection in (linear, conv):
            projection.bias.copy_(torch.tensor([10.0, 20.0]))
            assert torch.equal(value_vectors(projection), wanted)
            assert projection(torch.tensor([[0.0, 1.0, 0.0]])).tolist() == [[13.0, 24.0]]


@every_architecture
def test_a_layer_has_one_projection_and_its_neurons(model_type):
    model = small_model(model_type)
    width = 128 if model_type in ("gpt2", "bloom") else 64  # 4 x 32 by default there
    assert num_neurons(model) == (2, width)
    assert [value_vectors(p).shape for p in mlp_output_projections(model)] == [(width, 32)] * 2


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_the_projection_is_what_ends_the_mlp(model_type):
    """Its output is the output of the whole MLP module, on an input that the test chooses."""
    model = tiny_model(model_type)
    layers = model.transformer.h if model_type == "gpt2" else model.base_model.layers
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    for layer, projection in zip(layers, mlp_output_projections(model), strict=True):
        seen = []
        handle = projection.register_forward_hook(lambda module, inputs, output, s=seen: s.append(output))
        whole = layer.mlp(hidden)
        handle.remove()
        assert torch.equal(whole, seen[0])


def test_the_neurons_of_a_gated_mlp_are_behind_the_gate():
    """Llama: silu(gate x) * (up x), recomputed from the weights."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    handle = mlp_output_projections(model)[0].register_forward_pre_hook(
        lambda m, inputs: seen.append(inputs[0])
    )
    mlp(hidden)
    handle.remove()
    gate, up = hidden @ mlp.gate_proj.weight.T, hidden @ mlp.up_proj.weight.T
    torch.testing.assert_close(seen[0], gate / (1 + torch.exp(-gate)) * up)


def test_an_unknown_architecture_is_named():
    config = AutoConfig.for_model("mpt", d_model=16, n_heads=2, n_layers=1, vocab_size=20)
    with pytest.raises(ConfigError, match="architecture 'mpt' .MptForCausalLM. are not known"):
        mlp_output_projections(AutoModelForCausalLM.from_config(config))


def test_blooms_sliced_projection_is_refused():
    """It multiplies with slices of the weight, without calling the projection."""
    model = tiny_model("bloom", pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(ConfigError, match="'bloom'"):
        mlp_output_projections(model)


def test_an_adapter_on_the_mlp_is_refused_and_one_elsewhere_is_not():
    peft = pytest.importorskip("peft")
    for target, refused in (("down_proj", True), ("q_proj", False)):
        adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=[target]))
        if refused:
            with pytest.raises(ConfigError, match="layer 0 of 'llama' .* merge the adapter"):
                mlp_output_projections(adapted)
        else:
            assert num_neurons(adapted) == (2, 64)


# --- recording ------------------------------------------------------------------------------------------


def naive_means(model, queries, responses) -> np.ndarray:
    """One unpadded row at a time, one position at a time, summed by numpy in float64."""
    projections = mlp_output_projections(model)
    sums, count = np.zeros(num_neurons(model)), 0
    for query, response in zip(queries, responses, strict=True):
        if not response:
            continue
        seen = []
        handles = [
            p.register_forward_pre_hook(lambda m, inputs, s=seen: s.append(inputs[0])) for p in projections
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([query + response]))
        for handle in handles:
            handle.remove()
        for token in range(len(response)):
            position = len(query) + token - 1
            for layer, activations in enumerate(seen):
                sums[layer] += activations.reshape(len(query) + len(response), -1)[position].double().numpy()
            count += 1
    assert count == sum(map(len, responses))
    return sums / count


@every_architecture
@pytest.mark.parametrize("batch_size", [1, 3])
def test_means_are_those_of_a_loop_over_single_rows(model_type, batch_size):
    model = small_model(model_type)
    means = mean_activations(model, QUERIES, RESPONSES, batch_size)
    assert means.dtype == torch.float64
    np.testing.assert_allclose(means.numpy(), naive_means(model, QUERIES, RESPONSES), rtol=0, atol=3e-6)


def test_recorded_are_the_positions_that_cached_generation_computes():
    """Greedy, by transformers: every forward's last position is one that emits a token."""
    model = tiny_model("llama")
    seen: list[list] = [[] for _ in range(2)]
    handles = [
        projection.register_forward_pre_hook(lambda m, inputs, s=seen[layer]: s.append(inputs[0][:, -1]))
        for layer, projection in enumerate(mlp_output_projections(model))
    ]
    query = [5, 6, 7]
    ids = model.generate(
        torch.tensor([query]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=2
    )
    for handle in handles:
        handle.remove()
    response = ids[0, 3:].tolist()
    assert len(response) == len(seen[0]) == 5
    expected = torch.stack([torch.cat(layer).double().mean(dim=0) for layer in seen])
    torch.testing.assert_close(
        mean_activations(model, [query], [response], batch_size=1), expected, rtol=0, atol=1e-5
    )


def test_the_mask_starts_at_the_last_prompt_token():
    batch = pad_batch([[5, 6], [7]], [[8, 9, 1], [1]], pad_id=0)
    assert emitting_mask(batch).tolist() == [
        [False, True, True, True, False],
        [False, True, False, False, False],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_the_precision(dtype):
    """A bias of 1 under a zero weight makes every activation of one neuron gelu(1), so that is their mean, exactly.
    A bfloat16 sum would stick at 256 times that value, a float32 one would be off by 1e-7."""
    model = tiny_model("gpt_neox")
    mlp = model.gpt_neox.layers[1].mlp
    with torch.no_grad():
        mlp.dense_h_to_4h.weight[7] = 0.0
        mlp.dense_h_to_4h.bias[7] = 1.0
    model.to(dtype)
    responses = [[20 + token % 30 for token in range(40)] for _ in range(30)]
    mean = mean_activations(model, [[5]] * 30, responses, batch_size=10)[1, 7].item()
    assert mean == pytest.approx(nn.functional.gelu(torch.ones(1, dtype=dtype)).item(), rel=1e-14)


def test_rows_without_an_answer_do_not_count_and_nothing_at_all_is_refused():
    model = tiny_model("gpt_neox")
    alone = mean_activations(model, [[5, 6]], [[7, 8]], 4)
    torch.testing.assert_close(
        mean_activations(model, [[5, 6], [9]], [[7, 8], []], 4), alone, rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="no token in any of the 2 responses"):
        mean_activations(model, [[5], [6]], [[], []], 4)
    with pytest.raises(ValueError, match="1 and 2 rows of ids"):
        mean_activations(model, [[5]], [[6], [7]], 4)


# --- hooks ----------------------------------------------------------------------------------------------


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_hooks_are_gone_after_recording_and_after_an_error():
    model = tiny_model("gpt_neox")
    before = num_hooks(model)
    mean_activations(model, QUERIES, RESPONSES, 2)
    assert num_hooks(model) == before
    with pytest.raises(IndexError):
        mean_activations(model, [[999]], [[5]], 2)  # no such token
    assert num_hooks(model) == before


def test_hooks_that_were_made_are_gone_when_a_later_one_cannot_be_made():
    model = tiny_model("gpt_neox")

    def hooks():
        yield mlp_output_projections(model)[0], lambda module, inputs: None
        assert num_hooks(model) == 1
        raise RuntimeError("no second hook")

    with pytest.raises(RuntimeError, match="no second hook"), pre_hooks(hooks()):
        pass
    assert num_hooks(model) == 0
