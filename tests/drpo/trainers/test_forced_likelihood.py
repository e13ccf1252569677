"""The auxiliary loss on forced tokens: its value, its gradient, where it is absent, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from online_runs import run_online
from tiny_updates import FORCED, Update, adamw, tiny_update

from drpo.config import ConfigError
from drpo.rollout.resets import ResetConfig

LEARNING_RATE = 0.1  # of the SGD of tiny_update


def mean_nll(update: Update) -> torch.Tensor:
    """The mean of -log pi over all forced tokens, row by row, from a forward of the whole batch."""
    batch = update.trajectory.batch
    logprobs = update.model(batch.queries, batch.query_mask, batch.responses, batch.response_mask)[0]
    losses = [-logprobs[row, t] for row, h in enumerate(FORCED) for t in range(h)]
    assert len(losses) == 13
    return torch.stack(losses).mean()


def test_the_step_is_that_of_ppo_plus_the_likelihood(tmp_path):
    """One SGD step: the gradients of the two losses add up."""
    plain, both, probe = (tiny_update(tmp_path) for _ in range(3))
    expected_loss = mean_nll(probe)
    expected_loss.backward()
    gradient = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in probe.model.parameters()
        ]
    )
    without = plain.run(microbatch_size=3)
    found = both.run(sft_coef=0.5, microbatch_size=3)
    torch.testing.assert_close(
        both.weights(), plain.weights() - LEARNING_RATE * 0.5 * gradient, atol=1e-6, rtol=0
    )
    assert gradient.norm() > 0.1
    assert found["sft_loss"] == pytest.approx(expected_loss.item(), rel=1e-5)
    assert found.keys() - without.keys() == {"sft_loss"}
    names = without.keys() - {"grad_norm"}
    assert {n: found[n] for n in names} == pytest.approx({n: without[n] for n in names}, abs=1e-7)


def test_the_update_does_not_depend_on_microbatches(tmp_path):
    results, statistics = [], []
    for microbatch_size in (8, 3, 1):
        update = tiny_update(tmp_path)
        statistics.append(
            update.run(sft_coef=1.0, num_epochs=2, num_minibatches=2, microbatch_size=microbatch_size)
        )
        results.append(update.weights())
    moved = (results[0] - tiny_update(tmp_path).weights()).norm()
    for result, found in zip(results[1:], statistics[1:], strict=True):
        assert float((result - results[0]).norm() / moved) < 1e-4
        assert found == pytest.approx(statistics[0], rel=1e-3, abs=1e-5)


def test_minibatches_without_forced_tokens_are_not_in_the_mean(tmp_path):
    """Eight minibatches of a row each; three tokens of row 0 are forced, and nothing moves."""
    forced = (3, 0, 0, 0, 0, 0, 0, 0)
    update = tiny_update(tmp_path, forced=forced, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    expected = -update.trajectory.logprobs[0, :3].mean().item()
    assert update.run(sft_coef=2.0, num_minibatches=8)["sft_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"forced": (0,) * 8, "sft_coef": 1.0}], ids=["off", "none forced"])
def test_without_weight_or_forced_tokens_nothing_changes(tmp_path, settings):
    forced, sft_coef = settings.get("forced", FORCED), settings.get("sft_coef", 0.0)
    plain, other = (tiny_update(tmp_path, forced=forced) for _ in range(2))
    found = other.run(sft_coef=sft_coef, num_minibatches=2)
    assert found == plain.run(num_minibatches=2) and "sft_loss" not in found
    assert torch.equal(plain.weights(), other.weights())


def test_a_policy_that_is_not_trained_does_not_learn_from_forced_tokens(tmp_path):
    update = tiny_update(tmp_path, optimizer=adamw)
    before = update.weights("policy")
    found = update.run(sft_coef=1.0, train_policy=False)
    assert torch.equal(update.weights("policy"), before) and found["sft_loss"] > 0


# --- whole runs -------------------------------------------------------------------------------------------

ALL_RESET = {"proportion": 1.0, "min_length": 1}


def test_a_run_raises_the_likelihood_of_what_was_forced(policy_folder, tmp_path):
    changes = {"reset": {**ALL_RESET, "sft_coef": 5.0}, "optim": {"learning_rate": 3e-3}}
    rows = run_online(policy_folder, tmp_path / "run", changes)
    losses = [row["ppo/sft_loss"] for row in rows]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0] - 0.2
    plain = run_online(policy_folder, tmp_path / "plain", {"reset": ALL_RESET, "num_steps": 1})
    assert "ppo/sft_loss" not in plain[0]


def test_a_forced_token_that_is_never_sampled_is_refused(policy_folder, tmp_path):
    changes = {"reset": {**ALL_RESET, "sft_coef": 0.1}, "rollout": {"bad_tokens": ["Ġ"]}, "num_steps": 1}
    with pytest.raises(ConfigError, match=r"reset.sft_coef trains on forced tokens, .* has \['Ġ'\], which"):
        run_online(policy_folder, tmp_path / "run", changes)
    without = {**changes, "reset": ALL_RESET}
    assert len(run_online(policy_folder, tmp_path / "without", without)) == 1


def test_impossible_weights_are_refused():
    with pytest.raises(ConfigError, match="sft_coef must be >= 0"):
        ResetConfig(sft_coef=-0.1)
