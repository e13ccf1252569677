"""Defects found in TRL's DPO trainer (1.10) that a whole run shows; test_peers says where the others are tested."""

from __future__ import annotations

import math

import pytest
from torch import nn
from transformers import AutoTokenizer

from drpo.config import load_recipe
from drpo.data.load import load_examples
from drpo.data.order import item_at
from drpo.trainers.preference.recipe import PreferenceRecipe


def test_label_smoothing_is_cdpo_and_robust_is_another_loss(preference_run):
    """At the start h = 0: cDPO's loss is log 2 whatever the smoothing, and so is that of rDPO; later they part."""
    losses = {}
    for name, smoothing in (("dpo", None), ("cdpo", 0.3), ("robust", 0.3)):
        loss = {"name": name, "label_smoothing": smoothing, "beta": 1.0}
        rows, _ = preference_run(loss=loss, eval={"every": 0})
        losses[name] = [row["train/loss"] for row in rows]
    for left, right in (("dpo", "cdpo"), ("dpo", "robust"), ("cdpo", "robust")):
        assert losses[left][0] == pytest.approx(losses[right][0])
        assert abs(losses[left][2] - losses[right][2]) > 1e-2


def test_ipo_is_summed_and_its_average_has_a_name_of_its_own(preference_run):
    """At the start both are (1 / (2 beta))^2; the gradient of the average is smaller by about the length."""
    rows = {
        name: preference_run(loss={"name": name, "beta": 0.5}, num_steps=1, eval={"every": 0})[0][0]
        for name in ("ipo", "ipo_avg")
    }
    assert [row["train/loss"] for row in rows.values()] == pytest.approx([1.0, 1.0], abs=1e-5)
    lengths = 4  # every response of the demo has more tokens than this
    assert rows["ipo"]["optim/grad_norm"] > lengths * rows["ipo_avg"]["optim/grad_norm"]


ROWS = {"num_steps": 1, "eval": {"every": 0}, "batch": {"size": 8, "microbatch_size": 8}}
FREE = {"name": "simpo", "target_margin": 0.5}


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_prompt_is_computed_once_for_both_responses(preference_run, share_prompts):
    """TRL puts the prompt before each of the two."""
    sizes: list[tuple[int, int]] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if (
            type(module).__name__ == "GPTNeoXModel" and len(output.last_hidden_state) >= 8
        ):  # probes have fewer
            sizes.append(output.last_hidden_state.shape[:2])

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        (row,), _ = preference_run(**ROWS, loss=FREE, share_prompts=share_prompts)
    finally:
        hook.remove()
    assert [rows for rows, _ in sizes] == [8 if share_prompts else 16]
    assert row["train/num_targets"] == 8


def test_the_head_sees_response_positions_alone_and_the_reference_runs_once(preference_run):
    """TRL makes logits of prompts too."""
    positions: list[int] = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if type(module).__name__ == "Linear" and module.out_features > 128:  # the vocabulary
            positions.append(math.prod(args[0].shape[:-1]))

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        (row,), folder = preference_run(**ROWS)
    finally:
        hook.remove()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    recipe = load_recipe(PreferenceRecipe, folder / "config.yaml", [])
    train = load_examples(recipe.data, tokenizer, "pairs").train
    batch = [item_at(train, index, recipe.seed) for index in range(8)]
    num_tokens = sum(len(example.chosen_ids) + len(example.rejected_ids) for example in batch)
    assert [size for size in positions if size > 50] == [num_tokens] * 2  # policy and reference
