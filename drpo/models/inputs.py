"""Inputs of a transformers model from a padded batch."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from drpo.models.positions import check_width
from drpo.tensors import position_ids


def model_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return keyword inputs for a padded batch (B, T), without pad ids and with positions of real tokens only.

    `position_ids` is left out for models without that argument (ALiBi: positions follow from the mask). Raises
    ConfigError when a row has more tokens than the model has positions.
    """
    check_width(model, attention_mask)
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask.logical_not(), 0),
        "attention_mask": attention_mask.long(),
    }
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids(attention_mask)
    return inputs


def takes_position_ids(model: nn.Module) -> bool:
    """Return whether the model's forward has a `position_ids` argument."""
    return "position_ids" in inspect.signature(model.forward).parameters


def unwrap_peft(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
