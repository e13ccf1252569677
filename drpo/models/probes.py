"""Sanity checks that padding and cached decoding leave a model's outputs unchanged, by running a tiny batch.

Attention masked by position passes. Recurrent layers may fail: they carry padding in their state, or keep that state
in a cache of their own, and sampled tokens and log-probabilities would then silently be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from drpo.config import ConfigError
from drpo.models.answers import answers_of
from drpo.models.frozen_weights import is_half, own_precision
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.tensors import position_ids

LONG, SHORT, OTHER = [5, 6, 7, 8, 9, 10], [11, 12], [13, 12]
"A row, one that is padded beside it, and one that ends as that one but begins otherwise."
ATTENTION_ON_CPU = ("eager", "sdpa")


def check_policy(model: nn.Module, key: str = "model.path", on_any_device: bool = False) -> None:
    """Raise ConfigError, naming `key`, unless padded rows and cached steps give the logits of whole texts.

    The probe runs once per model and kind of device, which may have its own kernels, or with `on_any_device` once on
    the first device: two rows of at most six tokens, and one step from the cache.
    """
    causal_lm = unwrap_peft(model)
    faults = _faults(causal_lm)
    device = causal_lm.get_input_embeddings().weight.device.type
    if device not in faults and not (on_any_device and faults):
        faults[device] = _policy_fault(causal_lm)
    if fault := next((fault for fault in faults.values() if fault), None):
        raise ConfigError(
            f"{key}: {type(causal_lm).__name__} {fault}: sampled tokens and log-probabilities would not be the "
            "model's own. Choose a model whose layers pass (docs/models.md), as all plain transformers do"
        )


def check_scalar_model(model: nn.Module, key: str = "value or reward model") -> None:
    """Raise ConfigError, naming `key`, unless a row has the same outputs in a padded batch as alone.

    The probe runs once per model, which must then have all its layers.
    """
    scalar_model = unwrap_peft(model)
    faults = _faults(scalar_model)
    if not faults:
        device = scalar_model.get_input_embeddings().weight.device.type
        faults[device] = _scalar_fault(scalar_model)
    if fault := next((fault for fault in faults.values() if fault), None):
        raise ConfigError(
            f"{key}: {type(scalar_model.backbone).__name__} {fault}: its scores would depend on the batch"
        )


def can_probe_now(model: nn.Module) -> bool:
    """Return whether a forward is cheap on the model's device; else it is probed at its first use.

    Half precision may take minutes on a CPU, and kernels that need a GPU do not run there.
    """
    weight = model.get_input_embeddings().weight
    plain = not is_half(model) and model.config._attn_implementation in ATTENTION_ON_CPU
    return plain or weight.device.type != "cpu"


def _faults(model: nn.Module) -> dict[str, str | None]:
    """Return what was found so far by kind of device."""
    return answers_of(model).setdefault("faults", {})


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and its own precision, without gradients, within this context."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), own_precision(model):
            yield
    finally:
        for module in training_modules:
            module.training = True


def _policy_fault(causal_lm: nn.Module) -> str | None:
    def outputs(ids: Tensor, mask: Tensor) -> Tensor:
        return causal_lm(**model_inputs(causal_lm, ids, mask), use_cache=False).logits[:, -1]

    with _probing(causal_lm):
        fault, whole, allowed = _padding_fault(outputs, causal_lm)
        if fault:
            return fault
        try:
            cached = _cached_logits(causal_lm).float()
        except Exception as error:  # Models without such a cache may raise any error.
            return f"cannot be decoded with a key-value cache ({type(error).__name__}: {str(error)[:100]})"
    if (cached - whole).norm(dim=1).max() > allowed:
        return "does not continue from its key-value cache as it reads the whole text"
    return None


def _scalar_fault(scalar_model: nn.Module) -> str | None:
    """Check the inputs of the head, since a single output shows little and a head of zeros nothing."""
    backbone = scalar_model.backbone

    def outputs(ids: Tensor, mask: Tensor) -> Tensor:
        return backbone(**model_inputs(backbone, ids, mask), use_cache=False).last_hidden_state[:, -1]

    with _probing(scalar_model):
        return _padding_fault(outputs, scalar_model)[0]


def _padding_fault(
    outputs: Callable[[Tensor, Tensor], Tensor], model: nn.Module
) -> tuple[str | None, Tensor, float]:
    """Return the fault of a padded row, the outputs of both rows at their last token, and the tolerance.

    Padding and a forgotten context change the outputs about as much as another context does. Rounding is allowed
    1% of that in float32; in half precision, where it is large, half.
    """
    weight = model.get_input_embeddings().weight
    ids, mask = _padded_rows(model)
    alone, other = (
        outputs(row, torch.ones_like(row, dtype=torch.bool)).float()
        for row in (torch.tensor([row], device=weight.device) % _vocab_size(model) for row in (SHORT, OTHER))
    )
    padded = outputs(ids, mask).float()
    if not alone.isfinite().all():  # diverged weights, which sampling and training report
        return None, torch.cat([padded[:1], alone]), float("inf")
    share, rounding = (0.5, 0.02) if is_half(model) else (0.01, 1e-5)
    allowed = float(share * (other - alone).norm() + rounding * alone.norm())
    fault = None
    if not (padded[1:] - alone).norm() <= allowed:
        fault = "gives a left-padded row other outputs than the row has alone"
    return fault, torch.cat([padded[:1], alone]), allowed


def _padded_rows(model: nn.Module) -> tuple[Tensor, Tensor]:
    weight, num_pads = model.get_input_embeddings().weight, len(LONG) - len(SHORT)
    ids = torch.tensor([LONG, [0] * num_pads + SHORT], device=weight.device) % _vocab_size(model)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :num_pads] = False
    return ids, mask


def _vocab_size(model: nn.Module) -> int:
    """Return the vocabulary size of the config: under ZeRO-3 the embedding may be on another process."""
    return getattr(model, "backbone", model).config.get_text_config().vocab_size


def _cached_logits(causal_lm: nn.Module) -> Tensor:
    """Compute logits (2, V) after both rows: all but the last token, reorder the cache, then one cached step."""
    ids, mask = _padded_rows(causal_lm)
    cache = DynamicCache(config=causal_lm.config)
    options = {"past_key_values": cache, "use_cache": True}
    causal_lm(**model_inputs(causal_lm, ids[:, :-1], mask[:, :-1]), **options)
    swapped = torch.tensor([1, 0], device=ids.device)
    cache.reorder_cache(swapped)
    ids, mask = ids[swapped], mask[swapped]
    inputs = model_inputs(causal_lm, ids, mask) | {"input_ids": ids[:, -1:]}
    if "position_ids" in inputs:
        inputs["position_ids"] = position_ids(mask)[:, -1:]
    return causal_lm(**inputs, **options).logits[:, -1][swapped]
