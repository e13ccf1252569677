"""MLP neurons: their value vectors, and their activations while a policy generates.

Neuron i of a layer is entry i of the input to the MLP's output projection: after the nonlinearity, and after the
gate where there is one. With activation a_i it adds a_i v_i to the MLP's output; v_i is its value vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drpo.config import ConfigError
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.tensors import PaddedBatch, pad_batch

Hook = Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]


def mlp_output_projections(model: nn.Module) -> list[nn.Module]:
    """Return the output projection of every layer's MLP, in layer order: nn.Linear or GPT-2's Conv1D.

    Raises ConfigError, naming the architecture, where the MLPs are not known to have one such projection per layer,
    and for projections with an adapter or quantised weights, whose value vectors are not available.
    """
    causal_lm = unwrap_peft(model)
    config, backbone = causal_lm.config, causal_lm.base_model
    match config.model_type:
        case "gpt_neox":
            projections = [layer.mlp.dense_4h_to_h for layer in backbone.layers]
        case "gpt2":
            projections = [block.mlp.c_proj for block in backbone.h]
        case "llama" | "mistral" | "qwen2" | "qwen3" | "gemma" | "gemma2":
            projections = [layer.mlp.down_proj for layer in backbone.layers]
        case "opt":
            projections = [layer.fc2 for layer in backbone.decoder.layers]
        case "bloom" if not config.slow_but_exact or config.pretraining_tp <= 1:  # else it is not called
            projections = [block.mlp.dense_4h_to_h for block in backbone.h]
        case other:
            raise ConfigError(
                f"the MLP neurons of architecture {other!r} ({type(causal_lm).__name__}) are not known; name its "
                "output projections in mlp_output_projections (eval/neurons/mlp_neurons.py)"
            )
    for layer, projection in enumerate(projections):
        if not (isinstance(projection, nn.Linear | Conv1D) and projection.weight.is_floating_point()):
            raise ConfigError(
                f"the MLP output projection of layer {layer} of {config.model_type!r} is {type(projection).__name__}, "
                "not a plain linear layer; merge the adapter, or load the model unquantised"
            )
    return projections


def value_vectors(projection: nn.Module) -> Tensor:
    """Return the output of each neuron per unit of activation, (d_mlp, d): W^T of nn.Linear, W of Conv1D."""
    weight = projection.weight.detach()
    return weight if isinstance(projection, Conv1D) else weight.T


def num_neurons(model: nn.Module) -> tuple[int, int]:
    """Return (number of layers L, neurons d_mlp of a layer)."""
    projections = mlp_output_projections(model)
    return len(projections), len(value_vectors(projections[0]))


@torch.no_grad()
def mean_activations(
    model: nn.Module,
    query_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> Tensor:
    """Average the activation of every neuron over the positions that emit the response tokens, (L, d_mlp) float64.

    a[l, i] = sum_{b, t} a_{l,i}(position before response token t of row b) / number of response tokens: the last
    prompt token and all response tokens but the last, which are the positions of cached generation. All response
    tokens have the same weight, including the stop token; padding and the rest of the prompt do not count. Sums are
    float64 for any precision of the model. The model should be in evaluation mode.

    Raises ValueError on unequal numbers of rows, an empty query, or no response token at all.
    """
    num_tokens = sum(map(len, response_ids))
    if num_tokens == 0:
        raise ValueError(f"no token in any of the {len(response_ids)} responses: no position to record")
    backbone = unwrap_peft(model).base_model
    device = backbone.get_input_embeddings().weight.device
    projections = mlp_output_projections(model)
    sums = torch.zeros(num_neurons(model), dtype=torch.float64, device=device)
    for rows in length_batches(query_ids, response_ids, batch_size):
        queries, responses = [query_ids[row] for row in rows], [response_ids[row] for row in rows]
        batch = pad_batch(queries, responses, pad_id=0).to(device)
        mask = emitting_mask(batch)
        hooks = [partial(_add_activations, layer_sums, mask) for layer_sums in sums]
        with pre_hooks(zip(projections, hooks, strict=True)):
            inputs = model_inputs(backbone, batch.query_responses, batch.attention_mask)
            backbone(**inputs, use_cache=False)
    return (sums / num_tokens).cpu()


def length_batches(
    context_ids: Sequence[Sequence[int]], text_ids: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Yield the numbers of the rows in batches, longest rows first. Raises ValueError on unequal numbers of rows."""
    if len(context_ids) != len(text_ids):
        raise ValueError(f"{len(context_ids)} and {len(text_ids)} rows of ids; give one of each per row")
    lengths = [len(context) + len(text) for context, text in zip(context_ids, text_ids, strict=True)]
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _add_activations(sums: Tensor, mask: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    activations = inputs[0].reshape(*mask.shape, -1)  # OPT flattens rows and positions
    sums.add_(activations[mask].sum(dim=0, dtype=torch.float64))


def emitting_mask(batch: PaddedBatch) -> Tensor:
    """Mark columns (B, Q+R) that emit response tokens: the last prompt token, all response tokens but the last."""
    mask = torch.zeros_like(batch.attention_mask)
    first, length = batch.queries.shape[1] - 1, batch.responses.shape[1]
    mask[:, first : first + length] = batch.response_mask
    return mask


@contextmanager
def pre_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Register forward pre-hooks within this context, and remove them on errors, too."""
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.enter_context(module.register_forward_pre_hook(hook))
        yield
