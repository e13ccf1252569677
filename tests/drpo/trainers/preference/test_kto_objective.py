"""KTO: losses and reference point against sums over tokens by hand; the partners; every cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from hand_pairs import PAD, PAIRS, naive_logprobs
from tiny_models import tiny_model
from torch import Tensor

from drpo.data.encode import Example
from drpo.data.records import DataError, Record
from drpo.trainers.preference.kto_objective import LabelledResponse, UnpairedObjective, make_labelled
from drpo.trainers.preference.recipe import LossConfig
from drpo.trainers.reference import FrozenCopy

CPU = torch.device("cpu")
KTO = LossConfig(name="kto", beta=0.3)


def single(prompt: str, query: list[int], completion: list[int], label: bool) -> Example:
    return Example(Record(prompt, "text", extra={"label": label}), query, completion_ids=completion)


# As pairs become single responses: the chosen one, then the rejected one, of the same prompt.
EXAMPLES = [
    single(pair.example.record.prompt, pair.example.query_ids, ids, label)
    for pair in PAIRS[:5]
    for ids, label in zip(pair.response_ids, (True, False), strict=True)
]
ITEMS = make_labelled(EXAMPLES)


# --- partners ---------------------------------------------------------------------------------------------


def test_the_partner_is_the_next_response_to_another_prompt():
    assert [item.example for item in ITEMS] == EXAMPLES
    assert [item.desirable for item in ITEMS] == [True, False] * 5
    chosen = [pair.example.chosen_ids for pair in PAIRS[:5]]
    following = [1, 2, 3, 4, 0]  # behind the last prompt comes the first
    assert [item.other_ids for item in ITEMS] == [chosen[i] for i in following for _ in (0, 1)]


@pytest.mark.parametrize("prompts", ["aab", "abb", "abab", "aabba", "abcaa", "ab"])
def test_no_response_is_its_own_partner_or_that_of_its_prompt(prompts):
    examples = [single(prompt, [3], [10 + i, 1], True) for i, prompt in enumerate(prompts)]
    prompt_of = {10 + i: prompt for i, prompt in enumerate(prompts)}
    for item in make_labelled(examples):
        assert prompt_of[item.other_ids[0]] != item.example.record.prompt


def test_one_prompt_alone_is_refused_and_no_response_at_all_is_not():
    with pytest.raises(DataError, match="loss.name=kto.*all prompts here are the same"):
        make_labelled([single("a", [3], [4, 1], True), single("a", [3], [5, 1], False)])
    assert make_labelled([]) == []


# --- the loss ---------------------------------------------------------------------------------------------


def objective_for(config: LossConfig = KTO) -> UnpairedObjective:
    policy, reference = tiny_model("gpt_neox", seed=0), tiny_model("gpt_neox", seed=1).requires_grad_(False)
    return UnpairedObjective(policy, config, reference=FrozenCopy(reference), pad_id=PAD, device=CPU)


def logratio(objective: UnpairedObjective, query: list[int], response: list[int]) -> Tensor:
    policy, reference = objective.model, objective._reference.module
    return (naive_logprobs(policy, query, response) - naive_logprobs(reference, query, response)).sum()


def naive_reference_point(objective: UnpairedObjective, items: list[LabelledResponse]) -> float:
    with torch.no_grad():
        ratios = [float(logratio(objective, item.example.query_ids, item.other_ids)) for item in items]
    return max(0.0, sum(ratios) / len(ratios))


def naive_losses(objective: UnpairedObjective, items: list[LabelledResponse], config: LossConfig) -> Tensor:
    z0 = naive_reference_point(objective, items)
    losses = []
    for item in items:
        ratio = logratio(objective, item.example.query_ids, item.example.completion_ids)
        if item.desirable:
            value = torch.sigmoid(config.beta * (ratio - z0))
            losses.append((config.desirable_weight or 1.0) * (1 - value))
        else:
            value = torch.sigmoid(config.beta * (z0 - ratio))
            losses.append((config.undesirable_weight or 1.0) * (1 - value))
    return torch.stack(losses)


def step(objective: UnpairedObjective, parts: list[slice], items: list[LabelledResponse] = ITEMS):
    """Losses, the gradient of their mean, and rows, computed in two passes over micro-batches."""
    batches = [objective.collate(items[part]) for part in parts]
    with torch.no_grad():
        seen = [objective(batch) for batch in batches]
    looked = {name: torch.cat([rows[name].double() for _, rows in seen]) for name in seen[0][1]}
    step_statistics = objective.step_statistics(torch.cat([losses for losses, _ in seen]), looked)
    results = [objective(batch, step_statistics) for batch in batches]
    losses = torch.cat([losses for losses, _ in results])
    rows = {name: torch.cat([rows[name].double() for _, rows in results]).detach() for name in results[0][1]}
    assert sum(objective.num_targets(batch) for batch in batches) == len(items)
    gradient = torch.autograd.grad(losses.mean(), list(objective.model.parameters()))
    return losses, gradient, rows


def sharpened(objective: UnpairedObjective, items: list[LabelledResponse]) -> list[LabelledResponse]:
    """The items whose partners are more probable to the policy than to the reference: z0 > 0."""
    ratios = [logratio(objective, item.example.query_ids, item.other_ids) for item in items]
    return [item for item, ratio in zip(items, ratios, strict=True) if ratio > 0]


@pytest.mark.parametrize("above_zero", [True, False], ids=["z0 > 0", "z0 = 0"])
@pytest.mark.parametrize("cut", ["whole", "one by one", "ragged"])
def test_losses_and_gradients_do_not_depend_on_the_micro_batches(cut, above_zero):
    config = LossConfig(name="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    objective = objective_for(config)
    items = sharpened(objective, ITEMS)
    if not above_zero:
        items = [item for item in ITEMS if item not in items]
    z0 = naive_reference_point(objective, items)
    assert (z0 > 0.1) == above_zero and len(items) >= 3
    n = len(items)
    parts = {
        "whole": [slice(0, n)],
        "one by one": [slice(i, i + 1) for i in range(n)],
        "ragged": [slice(0, 2), slice(2, n)],
    }[cut]
    losses, gradient, rows = step(objective, parts, items)
    expected = naive_losses(objective, items, config)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
    assert rows["reference_point"].tolist() == pytest.approx([z0] * n, rel=1e-4, abs=1e-6)
    wanted = torch.autograd.grad(expected.mean(), list(objective.model.parameters()))
    scale = max(float(part.abs().max()) for part in wanted)
    for got, right in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-4 * scale)


def test_metrics():
    objective = objective_for()
    losses, _, rows = step(objective, [slice(0, 4), slice(4, 10)])
    metrics = objective.summarise(losses, rows)
    z0 = naive_reference_point(objective, ITEMS)
    with torch.no_grad():
        ratios = [float(logratio(objective, i.example.query_ids, i.example.completion_ids)) for i in ITEMS]
    rewards = [0.3 * ratio for ratio in ratios]
    assert metrics == pytest.approx(
        {
            "reward": sum(rewards) / 10,
            "reward_desirable": sum(rewards[::2]) / 5,
            "reward_undesirable": sum(rewards[1::2]) / 5,
            "reference_point": z0,
            "desirable": 0.5,
            "accuracy": sum((r > z0) == item.desirable for r, item in zip(ratios, ITEMS, strict=True)) / 10,
        },
        rel=1e-4,
        abs=1e-6,
    )
    only_good = {name: values[::2] for name, values in rows.items()}
    assert "reward_undesirable" not in objective.summarise(losses[::2], only_good)
    assert not any(math.isnan(value) for value in objective.summarise(losses[::2], only_good).values())
