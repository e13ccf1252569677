"""Inputs of the speed benchmark: random models, and texts whose words are one token each."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)

from drpo.data.order import item_at
from launch.experiments.flops import Shape
from launch.experiments.measured_run import write_rows
from launch.experiments.speed_cases import NUM_RANKED
from reward_models.model import RewardModel

STOP_LOGIT = 25.0
"What the stop token's logit is above or below the others', up to a few units."
SHORTEST = 20
"Tokens of the shortest prompt or response of uneven ones, so that 95% of it leaves at least one token."


@dataclass(frozen=True)
class Spread:
    """Log-normal lengths: median and longest in multiples of a length, and the standard deviation of the logarithm."""

    median: float = 1.0
    sigma: float = 0.0
    longest: float = 1.0

    def draw(self, length: int, num_rows: int, rng: np.random.Generator) -> np.ndarray:
        """Return the lengths of `num_rows` texts whose unit is `length`."""
        if not self.sigma:
            return np.full(num_rows, length)
        lengths = np.exp(rng.normal(np.log(self.median * length), self.sigma, num_rows))
        return lengths.astype(int).clip(SHORTEST, self.longest_of(length))

    def longest_of(self, length: int) -> int:
        """Return the longest that `draw` gives."""
        return max(SHORTEST, int(self.longest * length)) if self.sigma else length


LENGTHS = {  # prompts in multiples of 256, responses in multiples of 53, by default
    "even": (Spread(), Spread()),
    "tldr": (Spread(1.0, 0.4, 2.0), Spread(0.65, 0.25, 1.0)),  # up to 512 and 53
    "chat": (Spread(1.0, 1.0, 8.0), Spread(4.0, 1.0, 19.0)),  # up to 2048 and 1007
}
"Lengths of prompts and responses, stop token included."


def make_models(folder: Path, shape: Shape, num_heads: int, positions: int, seed: int) -> int:
    """Write the policy, two of its kind that never or always end, and a reward model; return the policy's weights.

    Args:
        folder: where their folders go.
        shape: sizes of each.
        num_heads: attention heads.
        positions: longest row.
        seed: of the random weights.
    """
    config = GPTNeoXConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=num_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=shape.vocabulary - 2,
        pad_token_id=shape.vocabulary - 1,
    )
    torch.manual_seed(seed)
    policy = AutoModelForCausalLM.from_config(config)
    tokenizer = _tokenizer(shape.vocabulary)
    scalar_config = copy.deepcopy(config)
    scalar_config.num_labels = 1
    scalar = AutoModelForSequenceClassification.from_config(scalar_config)
    # The head that launch/reward_model.py starts from.
    scalar.base_model.load_state_dict(policy.base_model.state_dict())
    head = RewardModel.from_causal_lm(copy.deepcopy(policy), seed).head
    scalar.score.weight.data.copy_(head.weight.data)
    named = {
        "policy": policy,
        "never_stops": _with_stop_logit(policy, -STOP_LOGIT),
        "stops": _with_stop_logit(policy, STOP_LOGIT),
        "reward_model": scalar,
    }
    for name, model in named.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return sum(parameter.numel() for parameter in policy.parameters())


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(_words(size))}
    words |= {"<stop>": size - 2, "<pad>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<pad>")


def _words(size: int) -> list[str]:
    return [f"w{i}" for i in range(size - 2)]


@torch.no_grad()
def _with_stop_logit(policy, logit: float):
    """Return a copy whose stop token has about this logit everywhere: a direction in which only its row looks."""
    changed = copy.deepcopy(policy)
    rows = changed.get_output_embeddings().weight
    direction = torch.nn.functional.normalize(torch.ones(rows.shape[1]), dim=0)
    rows -= (rows @ direction)[:, None] * direction
    rows[policy.config.eos_token_id] = direction * np.sign(logit)
    changed.base_model.final_layer_norm.bias += abs(logit) * direction
    return changed


def make_texts(
    folder: Path, vocabulary: int, prompt_length: int, response_length: int, num_rows: int, seed: int
) -> None:
    """Write demonstrations, pairs and ranked responses of every kind of lengths, in our order of a run and as TRL's.

    Args:
        folder: where the files go: <lengths>_{demonstrations,pairs,ranked}.jsonl, and *_in_order.jsonl.
        vocabulary: ids of the tokenizer.
        prompt_length: unit of the lengths of prompts.
        response_length: unit of the lengths of responses.
        num_rows: of each file.
        seed: of texts and order.
    """
    words = np.array(_words(vocabulary))
    for name, (prompts, responses) in LENGTHS.items():
        rng = np.random.default_rng([seed, len(name)])
        lengths = prompts.draw(prompt_length, num_rows, rng)
        answers = [responses.draw(response_length, num_rows, rng) for _ in range(2)]

        def text(length: int, rng=rng) -> str:
            return " ".join(rng.choice(words, length))

        rows = [
            # The stop token is appended to a response later.
            {"prompt": text(prompt), "chosen": f" {text(one - 1)}", "rejected": f" {text(other - 1)}"}
            for prompt, one, other in zip(lengths, *answers, strict=True)
        ]
        demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        ranked = [
            {
                "prompt": row["prompt"],
                "responses": [
                    f" {text(length - 1)}" for length in responses.draw(response_length, NUM_RANKED, rng)
                ],
                "scores": list(range(NUM_RANKED)),
            }
            for row in rows
        ]
        for kind, items in (("pairs", rows), ("demonstrations", demonstrations), ("ranked", ranked)):
            write_rows(folder / f"{name}_{kind}.jsonl", items)
            in_order = [item_at(items, index, seed) for index in range(num_rows)]
            write_rows(folder / f"{name}_{kind}_in_order.jsonl", in_order)


def longest(name: str, prompt_length: int, response_length: int) -> tuple[int, int]:
    """Return the longest prompt and response of a kind of lengths."""
    prompts, responses = LENGTHS[name]
    return prompts.longest_of(prompt_length), responses.longest_of(response_length)
