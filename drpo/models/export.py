"""Write a trained model as a plain folder that `from_pretrained` reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from drpo.models.adapters import merged_state_dict
from drpo.models.inputs import unwrap_peft
from drpo.models.plain_folder import amend_json, mend_generation_config, plain_tokenizer
from drpo.models.policy_stops import write_stop_token


def save_policy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, card: str) -> None:
    """Write weights (LoRA folded in), config, tokenizer and `card` as README.md; an older folder is replaced.

    A LoRA model on a bfloat16 base is written in float32: the base's weights exactly, the sum unrounded. So are frozen
    matrices that were rounded for a bf16 run, beside float32 ones.
    The tokenizer pads as plain transformers needs it (`plain_tokenizer`).

    The write is atomic: everything goes to a temporary folder next to `path`, which is then renamed.
    Works for a reward model too.
    """
    path = Path(path)
    partial = path.with_name(f".partial_{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    plain = unwrap_peft(model)
    write_stop_token(plain, tokenizer)
    mend_generation_config(plain)
    weights = merged_state_dict(model, device="cpu")
    is_bf16 = any(weight.dtype == torch.bfloat16 for weight in weights.values())
    if is_bf16 and (plain is not model or plain.dtype == torch.float32):
        weights = _in_float32(weights)
    plain.save_pretrained(partial, state_dict=weights)
    plain_tokens = plain_tokenizer(tokenizer, plain)
    plain_tokens.save_pretrained(partial)
    dtype = str(plain.dtype if plain is model else torch.float32).removeprefix("torch.")
    amend_json(partial / "config.json", pad_token_id=plain_tokens.pad_token_id, dtype=dtype)
    amend_json(partial / "generation_config.json", pad_token_id=plain_tokens.pad_token_id)
    (partial / "README.md").write_text(card, encoding="utf-8")
    old = path.with_name(f".old_{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(partial, path)
    if old.exists():
        shutil.rmtree(old)


def _in_float32(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the floating-point weights to float32; tied ones, which have several names, stay one tensor."""
    by_place: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: by_place.setdefault((weight.data_ptr(), weight.shape), weight.float())
        if weight.is_floating_point()
        else weight
        for name, weight in weights.items()
    }
