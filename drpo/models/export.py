"""Writing a trained model as a plain folder that `from_pretrained` reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from drpo.models.adapters import merged_state_dict
from drpo.models.inputs import unwrap_peft
from drpo.models.stops import write_stop_token


def save_policy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, card: str) -> None:
    """Write weights (LoRA folded in), config, tokenizer and `card` as README.md; an older folder is replaced.

    Everything goes to a folder beside `path` first, which is then renamed, so `path` is never half written.
    Works for a reward model too.
    """
    path = Path(path)
    partial = path.with_name(f".partial_{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_stop_token(unwrap_peft(model), tokenizer)
    unwrap_peft(model).save_pretrained(partial, state_dict=merged_state_dict(model))
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if path.exists():
        old = path.with_name(f".old_{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)
