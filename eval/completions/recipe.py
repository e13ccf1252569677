"""The recipe of launch/complete.py: a policy, prompts and sampling settings; or a file made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from drpo.config import Section, key, refuse, refuse_changed, setting
from drpo.data.load import DataConfig
from drpo.rollout.sampler import SamplingConfig
from eval.completions.imported import ImportConfig
from eval.completions.rows import is_built_in

FOR_AN_IMPORT = (
    *("run_dir", "system", "dtype", "attn_implementation", "mixed_precision", "batch_size"),
    *("reference", "null_response", "perplexity_policy", "imported"),
)
"Keys that apply to a file made elsewhere, which has its texts already."


@dataclass(frozen=True)
class CompleteRecipe(Section):
    """A policy's responses to prompts."""

    run_dir: str = "runs/complete"
    """Folder of the results."""
    policy: str | None = None
    """The policy: folder, hub id or GGUF file."""
    system: str | None = None
    """The name of the policy in tables: sft, drpo_seed1, ... For a file made elsewhere null keeps its own names."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the weights; auto: as saved."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; null: transformers' choice."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Autocast precision; no is float32. null takes what `accelerate launch --mixed_precision` or its config file says;
    without them bf16 on a GPU or CPU that has instructions for it, else float32."""
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "eval"] = "eval"
    """Which split of the data the prompts are from; eval are the held-out ones."""
    num_prompts: int | None = setting(None, ge=1)
    """So many of the prompts, chosen by their hashes; null for all."""
    num_responses: int = setting(1, ge=1)
    """Responses to each prompt, with the seeds seed, seed + 1, ..."""
    seed: int = setting(0, ge=0)
    """With the prompt, all that a response's random numbers depend on."""
    max_response_length: int = setting(53, ge=1)
    """The most tokens of a response, stop token included."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Temperature (0 is greedy), top_k, top_p."""
    bad_tokens: list[str] = field(default_factory=list)
    """Tokens that are never sampled, in addition to padding and ids that the tokenizer does not have."""
    batch_size: int = setting(32, ge=1)
    """Responses sampled together on one device; the file is written after each batch."""
    reference: bool = False
    """Add the dataset's own responses as the system "reference"."""
    null_response: bool = False
    """Add a constant response as the system "null": a judge that prefers it is no judge."""
    perplexity_policy: str | None = None
    """Measure the responses' perplexity under this policy, a folder, hub id or GGUF file; null: do not."""
    imported: ImportConfig = field(default_factory=ImportConfig)

    def check(self) -> None:
        rule = f"must be below 2^63 - {key('num_responses')}, got {self.seed}"
        refuse(self.seed >= 2**63 - self.num_responses, "seed", rule)
        rule = f"must be 1 for {key('sampling.temperature')}=0, which gives the same response each time"
        refuse(self.num_responses > 1 and self.sampling.temperature == 0, "num_responses", rule)
        rule = f"must not be the name of a built-in system, got {self.system}; choose another"
        refuse(is_built_in(self.system or ""), "system", rule)
        if self.imported.path is not None:
            names = [field.name for field in fields(self) if field.name not in FOR_AN_IMPORT]
            refuse_changed(self, names, f"does not apply to {key('imported.path')}={self.imported.path}")
        else:
            refuse_changed(self, ["imported"], f"needs {key('imported.path')}")
