"""The recipe of launch/complete.py: a policy, prompts, and how it is asked; or a file made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from drpo.data.load import DataConfig
from drpo.rollout.sampler import SamplingConfig
from eval.completions.imported import ImportConfig
from eval.completions.rows import NULL, REFERENCE


@dataclass(frozen=True)
class CompleteRecipe:
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
    num_prompts: int | None = None
    """So many of the prompts, chosen by their hashes; null for all."""
    num_responses: int = 1
    """Responses to each prompt, with the seeds seed, seed + 1, ..."""
    seed: int = 0
    """With the prompt, all that a response's random numbers depend on."""
    max_response_length: int = 53
    """The most tokens of a response, stop token included."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Temperature (0 is greedy), top_k, top_p."""
    bad_tokens: list[str] = field(default_factory=list)
    """Tokens that are never sampled, beside padding and ids that the tokenizer does not have."""
    batch_size: int = 32
    """Responses sampled together on one device; the file is written after each batch."""
    reference: bool = False
    """Add the dataset's own responses as the system "reference"."""
    null_response: bool = False
    """Add a constant response as the system "null": a judge that prefers it is no judge."""
    perplexity_policy: str | None = None
    """Measure the responses' perplexity under this policy, a folder, hub id or GGUF file; null: do not."""
    imported: ImportConfig = field(default_factory=ImportConfig)

    def __post_init__(self) -> None:
        for name in ("num_responses", "max_response_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts must be >= 1 or null, got {self.num_prompts}")
        if not 0 <= self.seed < 2**63 - self.num_responses:
            raise ValueError(f"seed must be in [0, 2^63 - num_responses), got {self.seed}")
        if self.num_responses > 1 and self.sampling.temperature == 0:
            raise ValueError("num_responses > 1 does not apply to sampling.temperature=0: all would be alike")
        if self.system is not None and (self.system in (REFERENCE, NULL) or "attack/" in self.system):
            raise ValueError(f"system={self.system} is the name of a built-in system; choose another")
        if self.imported.path is not None:
            self._refuse_beside_import()
        elif self.imported != ImportConfig():
            raise ValueError("imported.format and imported.columns need imported.path")

    def _refuse_beside_import(self) -> None:
        """A file made elsewhere has its texts already."""
        taken = {"run_dir", "system", "dtype", "attn_implementation", "mixed_precision", "batch_size"}
        taken |= {"reference", "null_response", "perplexity_policy", "imported"}
        plain = CompleteRecipe()
        for name in sorted(vars(self).keys() - taken):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} does not apply to imported.path={self.imported.path}")
