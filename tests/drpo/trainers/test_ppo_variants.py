"""The variants of the PPO update on a real tiny model: clips and normalisation of the policy loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_updates import MAX_RESPONSE_LENGTH, tiny_update


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_policy_loss_and_bonus_are_normalised_as_asked(tmp_path, normalisation):
    """At the sampling policy a token's loss is -A. Weights move by the loss's gradient: that of scaled advantages."""
    update, plain = tiny_update(tmp_path), tiny_update(tmp_path)
    mask = update.credit.policy_mask
    lengths, total = mask.sum(dim=1).tolist(), int(mask.sum())
    weights = {
        "token": [1 / total] * 8,
        "sequence": [1 / (8 * length) for length in lengths],
        "constant": [1 / (8 * MAX_RESPONSE_LENGTH)] * 8,
    }[normalisation]
    settings = {"microbatch_size": 3, "value_coef": 0.0}
    found = update.run(loss_normalisation=normalisation, **settings)
    advantages = update.credit.advantages
    expected = sum(-float(a) * weights[row] for row in range(8) for a in advantages[row][mask[row]])
    assert found["policy_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    scaled = advantages * torch.tensor(weights)[:, None] * total
    plain.credit = plain.credit._replace(advantages=scaled)
    other = plain.run(**settings)
    torch.testing.assert_close(update.weights(), plain.weights(), atol=1e-6, rtol=0)
    assert {n: v for n, v in found.items() if n not in ("policy_loss", "grad_norm")} == pytest.approx(
        {n: v for n, v in other.items() if n not in ("policy_loss", "grad_norm")}, abs=1e-6
    )


@pytest.mark.parametrize("normalisation", ["sequence", "constant"])
def test_normalisation_counts_the_entropy_bonus_too(tmp_path, normalisation):
    """Without advantages the bonus is the loss; in rows of equal length every normalisation is one factor."""
    lengths, forced = (5,) * 8, (1,) * 8
    moves = []
    for name in ("token", normalisation):
        update = tiny_update(tmp_path, lengths=lengths, forced=forced)
        update.credit = update.credit._replace(advantages=torch.zeros_like(update.credit.advantages))
        before = update.weights()
        update.run(loss_normalisation=name, entropy_coef=1.0, value_coef=0.0)
        moves.append(update.weights() - before)
    factor = {"sequence": 1.0, "constant": 4 / MAX_RESPONSE_LENGTH}[normalisation]
    assert moves[0].norm() > 1e-4
    torch.testing.assert_close(moves[1], factor * moves[0], atol=1e-6, rtol=1e-3)


VARIANTS = {
    "sequence": {"loss_normalisation": "sequence"},
    "constant": {"loss_normalisation": "constant"},
    "clips": {"clip_range_high": 0.05, "dual_clip": 1.2},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_variants_do_not_depend_on_microbatches(tmp_path, settings):
    results, statistics = [], []
    for microbatch_size in (8, 3, 1):
        update = tiny_update(tmp_path, off_policy=0.3)
        statistics.append(
            update.run(
                num_epochs=2,
                num_minibatches=2,
                microbatch_size=microbatch_size,
                entropy_coef=0.1,
                **settings,
            )
        )
        results.append(update.weights())
    before = tiny_update(tmp_path, off_policy=0.3)
    moved = (results[0] - before.weights()).norm()
    for result, found in zip(results[1:], statistics[1:], strict=True):
        assert float((result - results[0]).norm() / moved) < 1e-4
        assert found == pytest.approx(statistics[0], rel=1e-3, abs=1e-5)
    before.run(num_epochs=2, num_minibatches=2, entropy_coef=0.1)
    assert float((before.weights() - results[0]).norm() / moved) > 1e-2, "the variant changes nothing"


def test_clips_bound_the_loss_of_the_update(tmp_path):
    """Off policy, with weights that do not move: token losses from the ratios, by a plain loop."""
    update = tiny_update(
        tmp_path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0), off_policy=0.8
    )
    batch, credit = update.trajectory.batch, update.credit
    with torch.no_grad():
        logprobs = update.model(batch.queries, batch.query_mask, batch.responses, batch.response_mask)[0]
    losses, num_clipped, num_held = [], 0, 0
    for row, t in credit.policy_mask.nonzero().tolist():
        ratio = math.exp(float(logprobs[row, t]) - float(update.trajectory.logprobs[row, t]))
        a = float(credit.advantages[row, t])
        objective = min(ratio * a, min(max(ratio, 0.8), 1.6) * a)
        held = a < 0 and objective < 1.9 * a
        losses.append(-max(objective, 1.9 * a) if a < 0 else -objective)
        num_clipped += held or (ratio > 1.6 if a > 0 else ratio < 0.8)
        num_held += held
    assert num_held and num_clipped > num_held
    stats = update.run(clip_range_high=0.6, dual_clip=1.9)
    assert stats["policy_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
    assert stats["clip_fraction"] == pytest.approx(num_clipped / len(losses))
