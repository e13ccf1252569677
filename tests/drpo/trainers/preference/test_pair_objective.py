"""The loss of pairs against sums over tokens of full, unpadded logits, pair by pair; Dr. DPO over a whole step."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_pairs import LOSSES, PAD, PAIRS, naive_loss, naive_sides
from tiny_models import tiny_model
from torch import Tensor, nn

from drpo.trainers.preference.pair_objective import PairObjective
from drpo.trainers.preference.pairs import Pair
from drpo.trainers.preference.recipe import DrDPOConfig, LossConfig, TokenWeightsConfig
from drpo.trainers.reference import FrozenCopy

CPU = torch.device("cpu")
RAGGED = [slice(0, 8)], [slice(i, i + 1) for i in range(8)], [slice(0, 3), slice(3, 6), slice(6, 8)]


@functools.cache
def models(model_type: str = "gpt_neox") -> tuple[nn.Module, nn.Module]:
    """A policy and another model as its reference."""
    return tiny_model(model_type, seed=0), tiny_model(model_type, seed=1).requires_grad_(False)


def objective_for(
    loss: LossConfig, model_type: str = "gpt_neox", share_prompts: bool = True
) -> PairObjective:
    policy, reference = models(model_type)
    options = {"share_prompts": share_prompts, "pad_id": PAD, "device": CPU}
    return PairObjective(policy, loss, reference=FrozenCopy(reference), **options)


def naive(config: LossConfig, pairs: list[Pair], model_type: str = "gpt_neox") -> Tensor:
    return torch.stack([naive_loss(config, pair, *models(model_type)) for pair in pairs])


def numbers(config: LossConfig, pairs: list[Pair], model_type: str = "gpt_neox") -> list[float]:
    with torch.no_grad():
        return naive(config, pairs, model_type).tolist()


# --- the losses -------------------------------------------------------------------------------------------


OF_THE_MARGIN = ("dpo", "cdpo", "robust", "hinge")
WEIGHTED = [
    replace(
        pair,
        token_weights=tuple(
            [1.0 if (place + row) % 3 else 0.25 for place in range(len(ids))] for ids in pair.response_ids
        ),
    )
    for row, pair in enumerate(PAIRS)
]
OFFSET = [
    replace(pair, offset=offset) for pair, offset in zip(PAIRS, [1.5, -0.7, 0, 2, 0.1, 0, 3, -2], strict=True)
]
CASES = {
    **{name: (LossConfig(name=name, **keys), PAIRS) for name, keys in LOSSES.items()},
    **{f"{name}, offsets": (LossConfig(name=name, **LOSSES[name]), OFFSET) for name in OF_THE_MARGIN},
    **{
        f"{name}, token weights": (
            LossConfig(name=name, token_weights=TokenWeightsConfig(), **keys),
            WEIGHTED,
        )
        for name, keys in LOSSES.items()
        if name not in ("ipo_avg", "simpo", "orpo")
    },
    **{
        f"{name}, {divergence}": (
            LossConfig(
                name=name,
                beta=0.05,
                divergence=divergence,
                divergence_alpha=0.4 if divergence == "alpha" else None,
                **LOSSES[name],
            ),
            OFFSET,
        )
        for name, divergence in (("dpo", "js"), ("cdpo", "alpha"), ("hinge", "forward_kl"), ("robust", "js"))
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_a_loop_over_pairs_and_tokens(case):
    config, pairs = CASES[case]
    objective = objective_for(config)
    batch = objective.collate(pairs)
    assert objective.num_targets(batch) == len(pairs)
    losses, rows = objective(batch)
    expected = naive(config, pairs)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(rows["pair_loss"], losses)
    assert expected.detach().std() > 1e-3  # else all pairs could be one
    parameters = list(objective.model.parameters())
    gradients = [torch.autograd.grad(total.sum(), parameters) for total in (losses, expected)]
    scale = max(float(gradient.abs().max()) for gradient in gradients[1])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "model_type", ["gpt2", "gemma2", "bloom"]
)  # tied; soft-capped, windows; cannot share
@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_way_to_the_log_probs_gives_the_same_losses(model_type, share_prompts):
    config = LossConfig()
    objective = objective_for(config, model_type, share_prompts)
    losses, _ = objective(objective.collate(PAIRS))
    assert losses.tolist() == pytest.approx(numbers(config, PAIRS, model_type), rel=1e-4)


LONGEST = 9 + 2 * (8 - 1)  # query of pair b beside responses as long as the chosen one of pair e
SHARED = [9, 17, 9, 11, 13, 9, 9, 7], [0] * 8  # query, chosen and rejected in one row, stop tokens included
SEPARATE = (
    [6, 18, 2, 8, 4, 10, 2, 4],
    [8, 12, 10, 8, 16, 4, 10, 8],
)  # two queries, two rows of the longer response


@pytest.mark.parametrize(
    ("model_type", "sizes", "share_prompts", "expected"),
    [
        ("gpt_neox", {}, True, SHARED),
        ("gpt_neox", {}, False, SEPARATE),
        ("bloom", {}, True, SEPARATE),  # cannot share
        ("mistral", {"sliding_window": LONGEST}, True, SHARED),
        ("mistral", {"sliding_window": LONGEST - 1}, True, SEPARATE),  # a batch of b and e would be too long
    ],
)
def test_length_of_a_pair_is_what_its_rows_take(model_type, sizes, share_prompts, expected):
    options = {"reference": None, "share_prompts": share_prompts, "pad_id": PAD, "device": CPU}
    objective = PairObjective(tiny_model(model_type, **sizes), LossConfig(), **options)
    objective.before_lengths(PAIRS)
    assert [objective.lengths(pair) for pair in PAIRS] == list(zip(*expected, strict=True))


def test_reference_log_probs_of_the_batch_take_the_place_of_a_reference():
    _, reference = models()
    cached = [
        replace(pair, reference_logprobs=tuple(side.numpy() for side in naive_sides(reference, pair)))
        for pair in WEIGHTED
    ]
    config = LossConfig(token_weights=TokenWeightsConfig())
    without = objective_for(config)
    without._reference = None
    losses, rows = without(without.collate(cached))
    assert losses.tolist() == pytest.approx(numbers(config, WEIGHTED), rel=1e-4)
    assert "implicit_kl" in rows


# --- Dr. DPO ----------------------------------------------------------------------------------------------


def split_step(
    objective: PairObjective, parts: list[slice]
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The sum of losses over the step, the gradient of their mean, and all rows, as the loop accumulates them."""
    batches = [objective.collate(PAIRS[part]) for part in parts]
    step_statistics = ()
    if objective.needs_step_statistics:
        with torch.no_grad():
            seen = [objective(batch) for batch in batches]
        rows = {name: torch.cat([rows[name].double() for _, rows in seen]) for name in seen[0][1]}
        step_statistics = (
            objective.step_statistics(torch.cat([losses for losses, _ in seen]).double(), rows),
        )
    results = [objective(batch, *step_statistics) for batch in batches]
    losses = torch.cat([losses for losses, _ in results])
    rows = {name: torch.cat([rows[name].double() for _, rows in results]).detach() for name in results[0][1]}
    return losses, torch.autograd.grad(losses.sum() / len(PAIRS), list(objective.model.parameters())), rows


def assert_same_gradient(got: list[Tensor], wanted: list[Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("parts", RAGGED, ids=["8", "1 x 8", "3 + 3 + 2"])
@pytest.mark.parametrize("name, beta_prime", [("dpo", 0.3), ("dpo", 30.0), ("robust", 1.0)])
def test_dr_dpo_follows_the_log_mean_exp_over_the_whole_step(name, parts, beta_prime):
    config = LossConfig(name=name, dr_dpo=DrDPOConfig(beta_prime), **LOSSES[name])
    objective = objective_for(config)
    _, gradient, rows = split_step(objective, parts)
    expected = naive(config, PAIRS)
    loss = -beta_prime * torch.log(torch.exp(-expected / beta_prime).mean())
    assert_same_gradient(
        gradient, torch.autograd.grad(loss, list(objective.model.parameters()), retain_graph=True)
    )
    raw = [math.exp(-number / beta_prime) for number in numbers(config, PAIRS)]
    assert rows["weight"].tolist() == pytest.approx([8 * number / sum(raw) for number in raw], rel=1e-3)
    metrics = objective.summarise(rows["weight"] * rows["pair_loss"], rows)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("parts", [[slice(0, 8)], [slice(0, 4), slice(4, 8)]], ids=["8", "4 + 4"])
def test_dr_dpo_over_micro_batches_is_the_released_loss(parts):
    """-beta' log mean exp(-l / beta') of each micro-batch, and the mean of those."""
    config = LossConfig(dr_dpo=DrDPOConfig(0.3, over="microbatch"))
    objective = objective_for(config)
    assert not objective.needs_step_statistics
    losses, gradient, rows = split_step(objective, parts)
    expected = naive(config, PAIRS)
    parts_of_it = [-0.3 * torch.log(torch.exp(-expected[part] / 0.3).mean()) for part in parts]
    loss = torch.stack(parts_of_it).mean()
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradient(
        gradient, torch.autograd.grad(loss, list(objective.model.parameters()), retain_graph=True)
    )
    for part in parts:
        assert float(rows["weight"][part].mean()) == pytest.approx(1, abs=1e-5)
    assert rows["pair_loss"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_large_beta_prime_is_plain_dpo_and_a_small_one_the_pair_of_least_loss():
    plain = objective_for(LossConfig())
    losses, gradient, _ = split_step(plain, [slice(0, 8)])
    _, almost, _ = split_step(objective_for(LossConfig(dr_dpo=DrDPOConfig(1e6))), [slice(0, 4), slice(4, 8)])
    assert_same_gradient(almost, gradient)
    _, _, rows = split_step(objective_for(LossConfig(dr_dpo=DrDPOConfig(1e-4))), [slice(0, 4), slice(4, 8)])
    least = int(losses.argmin())
    assert rows["weight"].tolist() == pytest.approx(
        [8.0 if row == least else 0.0 for row in range(8)], abs=1e-3
    )


# --- what is reported -------------------------------------------------------------------------------------


def reported(config: LossConfig, pairs: list[Pair]) -> dict[str, float]:
    objective = objective_for(config)
    with torch.no_grad():
        losses, rows = objective(objective.collate(pairs))
    return objective.summarise(losses.double(), {name: values.double() for name, values in rows.items()})


def test_metrics_are_those_of_the_pairs():
    policy, reference = models()
    with torch.no_grad():
        sides = [(*naive_sides(policy, pair), *naive_sides(reference, pair)) for pair in PAIRS]
    w, r, w_ref, r_ref = (
        np.array([float(side.sum()) for side in column]) for column in zip(*sides, strict=True)
    )
    losses = numbers(LossConfig(beta=0.2), PAIRS)
    margins = 0.2 * (w - w_ref) - 0.2 * (r - r_ref)
    flipped = np.array([pair.example.record.extra["flipped"] for pair in PAIRS])
    expected = {
        "chosen_logprobs": w.mean(),
        "rejected_logprobs": r.mean(),
        "chosen_reward": 0.2 * (w - w_ref).mean(),
        "rejected_reward": 0.2 * (r - r_ref).mean(),
        "reward_margin": margins.mean(),
        "accuracy": (margins > 0).mean(),
        "implicit_kl": ((w_ref - w) + (r_ref - r)).mean() / 2,
        "pair_loss": np.mean(losses),
        "flipped": 0.25,
        "accuracy_flipped": (margins > 0)[flipped].mean(),
        "accuracy_clean": (margins > 0)[~flipped].mean(),
        "pair_loss_flipped": np.array(losses)[flipped].mean(),
        "pair_loss_clean": np.array(losses)[~flipped].mean(),
        **{f"pair_loss_p{q}": np.quantile(losses, q / 100) for q in (10, 50, 90)},
    }
    assert 0 < expected["accuracy"] < 1
    assert reported(LossConfig(beta=0.2), PAIRS) == pytest.approx(expected, rel=1e-4)


def test_the_weights_of_flipped_and_clean_pairs_are_told_apart():
    config = LossConfig(dr_dpo=DrDPOConfig(0.5))
    objective = objective_for(config)
    _, _, rows = split_step(objective, [slice(0, 3), slice(3, 6), slice(6, 8)])
    metrics = objective.summarise(rows["pair_loss"], rows)
    raw = [math.exp(-number / 0.5) for number in numbers(config, PAIRS)]
    weights = [8 * number / sum(raw) for number in raw]
    assert metrics["weight_flipped"] == pytest.approx((weights[1] + weights[4]) / 2, rel=1e-3)
    assert metrics["weight_clean"] == pytest.approx((8 - weights[1] - weights[4]) / 6, rel=1e-3)


def test_without_noise_nothing_is_said_of_flips():
    record = replace(PAIRS[0].example.record, extra={})
    clean = replace(PAIRS[0], example=replace(PAIRS[0].example, record=record))
    assert not [name for name in reported(LossConfig(), [clean]) if "flipped" in name or "clean" in name]
    assert "accuracy_flipped" not in reported(LossConfig(), PAIRS[:1])  # noise that hit none of these


def test_without_a_reference_the_reward_is_the_scaled_mean_log_prob():
    policy, _ = models()
    metrics = reported(LossConfig(name="simpo", beta=2.0, target_margin=0.5), PAIRS[:2])
    with torch.no_grad():
        means = [[float(side.mean()) for side in naive_sides(policy, pair)] for pair in PAIRS[:2]]
    assert metrics["chosen_reward"] == pytest.approx(means[0][0] + means[1][0], rel=1e-4)  # 2.0 / 2 pairs
    assert metrics["rejected_reward"] == pytest.approx(means[0][1] + means[1][1], rel=1e-4)
    assert "implicit_kl" not in metrics
