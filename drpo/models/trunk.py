"""A frozen trunk: the lowest layers of a model, run once for all models that share them.

With `model.trainable_layers = k` of n layers only the k top layers (and the modules after them) learn. The policy, its
reference, the critic and a reward model then compute the same on the same tokens up to layer n - k:

    trunk = trunk_output(policy, batch)              # (B, T, H), without gradients, once
    with resumed_from(trunk, policy): ...            # every call of `policy` here starts at layer n - k

The result is exact: the layers get the same inputs as without sharing. With `share_trunk` several models hold the same
trunk in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drpo.config import ConfigError
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.models.probes import check_policy, check_scalar_model
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import head_is_plain
from drpo.models.shared_prompt import PackedRows, can_share_prompt, packed_inputs, shared_states
from drpo.tensors import PaddedBatch, pad_batch

FIRST_TRAINED = "drpo_first_trained_layer"  # set on the backbone, so that copies of a model know it too


def has_trunk(model: nn.Module) -> bool:
    """Return whether the model's lowest layers are frozen."""
    return hasattr(_backbone(model), FIRST_TRAINED)


def freeze_trunk(model: nn.Module, trainable_layers: int) -> None:
    """Freeze all modules that run before the `trainable_layers` top layers; the rest stays as it is.

    Tied embeddings are the trunk's input, so they are frozen with it. Raises ConfigError when the model has no
    more layers than that, or cannot be split there: a probe compares the outputs with and without the split.
    """
    backbone, num_layers = _backbone(model), len(_layers(model))
    if not trainable_layers < num_layers:
        raise ConfigError(
            f"model.trainable_layers is {trainable_layers}, but the model has {num_layers} layers; give fewer, or "
            "null to train all of them"
        )
    setattr(backbone, FIRST_TRAINED, num_layers - trainable_layers)
    _run_probes(model)
    if not _can_be_cut(model):
        raise ConfigError(
            f"model.trainable_layers: the layers of {type(backbone).__name__} take or give back more than hidden "
            "states, so they cannot be cut; set it to null"
        )
    for module in _modules_before(model, num_layers - trainable_layers).values():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def trained_layer_names(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of the top layers in `model.named_modules()`."""
    layers = _layers(model)
    top = set(layers[_first_trained(model) :])
    return tuple(f"{name}." for name, module in model.named_modules() if module in top)


def trunk_output(model: nn.Module, batch: PaddedBatch, num_continuations: int = 1) -> Tensor:
    """Return the input of layer n - k, (B, Q+R, H), without gradients; the layers above do not run.

    Where the rows are K > 1 blocks with the same queries, these are computed once (drpo.models.shared_prompt); the
    model must be able to (`shares_rows`).
    """
    first = _first_trained(model)
    if num_continuations == 1:
        return _trunk_of(model, batch, first)
    backbone = _backbone(model)

    def compute(packed: PackedRows) -> Tensor:
        return _states_before(backbone, packed_inputs(backbone, packed), first)

    return shared_states(compute, batch, num_continuations)


def _trunk_of(model: nn.Module, batch: PaddedBatch, first: int) -> Tensor:
    backbone = _backbone(model)
    inputs = model_inputs(backbone, batch.query_responses, batch.attention_mask)
    return _states_before(backbone, inputs, first)


@torch.no_grad()
def _states_before(backbone: nn.Module, inputs: dict[str, Tensor], first: int) -> Tensor:
    with _layers_replaced(backbone) as layers:
        for index in range(first, len(layers)):
            layers[index] = _Skipped(layers[index])
        with _caught_at(layers, first) as caught:
            backbone(**inputs, use_cache=False)
    return caught[-1]


@contextmanager
def recorded_trunk(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the trunk's output of each call of `model` within this context in the list.

    The list stays empty for a model without a trunk.
    """
    if not has_trunk(model):
        yield []
        return
    with _caught_at(_layers(model), _first_trained(model)) as caught:
        yield caught


@contextmanager
def resumed_from(trunk: Tensor | None, *models: nn.Module) -> Iterator[None]:
    """Start calls of `models` within this context from `trunk` (B, T, H) in place of their lower layers' output.

    The calls must be on the tokens that `trunk` was computed from, shared rows of a prompt on their `packed_states`.
    None changes nothing.
    """
    with ExitStack() as stack:
        for model in models if trunk is not None else ():
            _run_probes(model)
            backbone, first = _backbone(model), _first_trained(model)
            layers = stack.enter_context(_layers_replaced(backbone))
            for index in range(first):
                layers[index] = _Skipped(layers[index])
            layers[first - 1].output = trunk
        yield


def share_trunk(model: nn.Module, source: nn.Module) -> None:
    """Replace the embedding and lower layers of `model` by those of `source`, so they are in memory once."""
    backbone, embedding = _backbone(model), _backbone(source).get_input_embeddings()
    layers, source_layers, first = _layers(model), _layers(source), _first_trained(source)
    for index in range(first):
        layers[index] = source_layers[index]
    tied = head_is_tied(model)
    backbone.set_input_embeddings(embedding)
    if tied:
        unwrap_peft(model).get_output_embeddings().weight = embedding.weight
    setattr(backbone, FIRST_TRAINED, first)
    _run_probes(model)


def head_is_tied(model: nn.Module) -> bool:
    """Return whether the output embedding is the input embedding, and so belongs to a frozen trunk."""
    head = unwrap_peft(model).get_output_embeddings()
    return head is not None and head.weight is _backbone(model).get_input_embeddings().weight


def same_trunk(model: nn.Module, source: nn.Module) -> bool:
    """Return whether `model` equals `source`, bit for bit, up to the end of the latter's trunk.

    A small batch detects differences that no weight shows (a scaled rotary embedding, another epsilon).
    """
    backbone, source_backbone, first = _backbone(model), _backbone(source), _first_trained(source)
    if type(backbone) is not type(source_backbone) or len(_layers(model)) != len(_layers(source)):
        return False
    weights, source_weights = (_trunk_weights(each, first) for each in (backbone, source_backbone))
    if weights.keys() != source_weights.keys():
        return False
    for weight, source_weight in zip(weights.values(), map(source_weights.get, weights), strict=True):
        if weight.dtype != source_weight.dtype or not torch.equal(weight, source_weight.to(weight.device)):
            return False
    outputs = [_trunk_of(m, _probe_batch(m), first).float().cpu() for m in (model, source)]
    mask = _probe_batch(source).attention_mask.cpu()
    return torch.allclose(outputs[0][mask], outputs[1][mask], rtol=1e-3, atol=1e-3)


def _trunk_weights(backbone: nn.Module, first: int) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": weight
        for name, module in _modules_before(backbone, first).items()
        for key, weight in module.named_parameters(recurse=False)
    }


class _Skipped(nn.Module):
    """Placeholder of a layer that returns its input, or `output`, with that layer's attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.output: Tensor | None = None
        for name, value in vars(layer).items():  # attention_type, layer_idx, ...
            if isinstance(value, int | float | str) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.output is None else self.output


@contextmanager
def _layers_replaced(backbone: nn.Module) -> Iterator[nn.ModuleList]:
    """Give the backbone a copy of its list of layers within this context, which may be changed."""
    owner, name = _layer_list(backbone)
    layers = getattr(owner, name)
    replacement = nn.ModuleList(layers)
    setattr(owner, name, replacement)
    try:
        yield replacement
    finally:
        setattr(owner, name, layers)


@contextmanager
def _caught_at(layers: nn.ModuleList, index: int) -> Iterator[list[Tensor]]:
    """Append the input of each call of `layers[index]` within this context to the list."""
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.append((args[0] if args else kwargs["hidden_states"]).detach())

    hook = layers[index].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield caught
    finally:
        hook.remove()


def _backbone(model: nn.Module) -> nn.Module:
    return unwrap_peft(model).base_model


def _layers(model: nn.Module) -> nn.ModuleList:
    return getattr(*_layer_list(_backbone(model)))


def _first_trained(model: nn.Module) -> int:
    return getattr(_backbone(model), FIRST_TRAINED)


def _layer_list(backbone: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that holds the list of layers, and the list's name there."""
    num_layers = backbone.config.get_text_config().num_hidden_layers
    lists = [
        (module, name)
        for module in backbone.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(lists) != 1:
        raise ConfigError(
            f"model.trainable_layers: {type(backbone).__name__} has {len(lists)} lists of {num_layers} layers, so it "
            "is not known where to cut; set it to null"
        )
    return lists[0]


@torch.no_grad()
def _modules_before(model: nn.Module, first: int) -> dict[str, nn.Module]:
    """Return, by name, the modules that run before layer `first`, and those outside the layers that never run."""
    layers = _layers(model)
    after: set[nn.Module] = {module for layer in layers[first:] for module in layer.modules()}
    reached = False

    def note(module: nn.Module, *args: Any) -> None:
        nonlocal reached
        reached = reached or module is layers[first]
        if reached:
            after.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        _probe(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in model.named_modules() if module not in after}


@torch.no_grad()
def _can_be_cut(model: nn.Module) -> bool:
    """Return whether a small ragged batch has the same outputs when resumed from the trunk's output."""
    try:
        whole = _probe(model)
        with resumed_from(trunk_output(model, _probe_batch(model)), model):
            resumed = _probe(model)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False  # a layer that takes or returns more than hidden states
    return torch.allclose(whole, resumed, rtol=1e-4, atol=1e-5)


def _probe(model: nn.Module) -> Tensor:
    """Return the model's output for the probe batch: numbers of scalar models, logits of language models."""
    plain, batch = unwrap_peft(model), _probe_batch(model)
    output = plain(**model_inputs(plain, batch.query_responses, batch.attention_mask))
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return output[batch.attention_mask].float()


def _probe_batch(model: nn.Module) -> PaddedBatch:
    device = _backbone(model).get_input_embeddings().weight.device
    return pad_batch([[3, 4, 5], [6]], [[7, 8], [9]], 0).to(device)


def _run_probes(model: nn.Module) -> None:
    """Run the one-time probes, which need the unmodified model."""
    plain = unwrap_peft(model)
    if isinstance(plain, ScalarModel):
        check_scalar_model(plain)
    elif plain.get_output_embeddings() is not None:
        check_policy(plain, on_any_device=True)
        head_is_plain(plain)
        can_share_prompt(plain)
