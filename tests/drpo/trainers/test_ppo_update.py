"""One PPO update on a real tiny GPT-NeoX through a real engine."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from tiny_updates import FORCED, LENGTHS, Update, adamw, tiny_update
from torch import Tensor

from drpo.models.scoring import response_logprobs
from drpo.tensors import pad_batch
from drpo.trainers.finite import finite_or_stop
from drpo.trainers.ppo_update import PPOConfig

ROWS = list(range(8))

# --- optimizer steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_epochs, num_minibatches, microbatch_size",
    [(1, 1, 8), (1, 4, 1), (3, 2, 2), (2, 2, 3), (2, 8, 4), (1, 1, 100)],
)
def test_exactly_epochs_times_minibatches_steps_on_different_minibatches(
    tmp_path, num_epochs, num_minibatches, microbatch_size
):
    """TRL steps once per accumulation window whatever num_mini_batches says, and once per micro-batch at the
    end of its data."""
    update = tiny_update(tmp_path)
    stats = update.run(
        num_epochs=num_epochs, num_minibatches=num_minibatches, microbatch_size=microbatch_size
    )
    assert len(update.minibatches) == num_epochs * num_minibatches
    assert stats["num_optimizer_steps"] == num_epochs * num_minibatches
    for epoch in range(num_epochs):
        minibatches = update.minibatches[epoch * num_minibatches : (epoch + 1) * num_minibatches]
        assert {len(rows) for rows in minibatches} == {8 // num_minibatches}
        assert sorted(sum(minibatches, [])) == ROWS  # each row once in an epoch
    assert max(map(len, update.forwards)) <= microbatch_size


def test_epochs_are_shuffled_apart(tmp_path):
    update = tiny_update(tmp_path)
    update.run(num_epochs=4, num_minibatches=2)
    assert len({tuple(sorted(rows)) for rows in update.minibatches}) > 2
    assert update.minibatches[0] + update.minibatches[1] != ROWS


@pytest.mark.parametrize("num_rows, num_minibatches", [(6, 4), (7, 3), (5, 5)])
def test_rows_that_do_not_divide_still_give_every_minibatch(tmp_path, num_rows, num_minibatches):
    update = tiny_update(tmp_path, lengths=LENGTHS[:num_rows], forced=FORCED[:num_rows])
    update.run(num_epochs=2, num_minibatches=num_minibatches)
    assert len(update.minibatches) == 2 * num_minibatches
    sizes = [len(rows) for rows in update.minibatches]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sum(update.minibatches[:num_minibatches], [])) == list(range(num_rows))


def test_every_step_moves_the_weights(tmp_path):
    update = tiny_update(tmp_path)
    seen = []
    update.optimizer.register_step_post_hook(lambda *_: seen.append(update.weights()))
    before = update.weights()
    update.run(num_epochs=2, num_minibatches=2)
    for first, second in zip([before, *seen], seen, strict=False):
        assert not torch.equal(first, second)


# --- statistics -------------------------------------------------------------------------------------------


def test_the_ratio_is_one_before_the_first_step(tmp_path):
    stats = tiny_update(tmp_path).run(microbatch_size=3)
    assert stats["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert stats["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert stats["clip_fraction"] == 0.0


def naive_statistics(update: Update, config: PPOConfig) -> list[dict[str, float]]:
    """The statistics of every minibatch, row by row and token by token, with weights that do not move."""
    trajectory, credit = update.trajectory, update.credit
    batch = trajectory.batch
    with torch.no_grad():
        new_logprobs, entropy, values = update.model(
            batch.queries, batch.query_mask, batch.responses, batch.response_mask
        )
    results = []
    for rows in update.minibatches:
        sums = dict.fromkeys(["policy_loss", "entropy", "approx_kl", "clip_fraction", "ratio"], 0.0)
        value_sums = dict.fromkeys(["value_loss", "value_clip_fraction"], 0.0)
        num_policy = num_value = 0
        for row in rows:
            for t in range(trajectory.responses.shape[1]):
                advantage = float(credit.advantages[row, t])
                if credit.policy_mask[row, t]:
                    num_policy += 1
                    log_ratio = float(new_logprobs[row, t]) - float(trajectory.logprobs[row, t])
                    ratio = math.exp(log_ratio)
                    held = min(max(ratio, 1 - config.clip_range), 1 + config.clip_range)
                    sums["policy_loss"] += max(-advantage * ratio, -advantage * held)
                    sums["clip_fraction"] += -advantage * held > -advantage * ratio
                    sums["approx_kl"] += ratio - 1 - log_ratio
                    sums["ratio"] += ratio
                    sums["entropy"] += float(entropy[row, t])
                if credit.value_mask[row, t]:
                    num_value += 1
                    new, old = float(values[row, t]), float(trajectory.values[row, t])
                    held = min(max(new, old - config.value_clip_range), old + config.value_clip_range)
                    target = float(credit.returns[row, t])
                    value_sums["value_loss"] += 0.5 * max((new - target) ** 2, (held - target) ** 2)
                    value_sums["value_clip_fraction"] += (held - target) ** 2 > (new - target) ** 2
        results.append(
            {name: value / num_policy for name, value in sums.items()}
            | {name: value / num_value for name, value in value_sums.items()}
        )
    return results


@pytest.mark.parametrize("masking", ["paper", "release"])
def test_statistics_are_plain_means_over_minibatches_of_token_means(tmp_path, masking):
    """TRL divides by slots that it never fills: a ratio of 1.0 was shown as 0.5 with two minibatches."""
    frozen = tiny_update(
        tmp_path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0), masking=masking, off_policy=0.4
    )
    settings = {"num_epochs": 2, "num_minibatches": 4, "microbatch_size": 1}
    stats = frozen.run(**settings)
    expected = naive_statistics(frozen, PPOConfig(**settings))
    assert len(expected) == 8
    assert 0.05 < stats["clip_fraction"] < 0.95 and 0.05 < stats["value_clip_fraction"] < 0.95
    for name in expected[0]:
        assert stats[name] == pytest.approx(np.mean([e[name] for e in expected]), rel=1e-3, abs=1e-5), name


def test_statistics_do_not_depend_on_the_microbatch_size(tmp_path):
    runs = [
        tiny_update(tmp_path, off_policy=0.3).run(num_minibatches=2, microbatch_size=size)
        for size in (1, 3, 4)
    ]
    for stats in runs[1:]:
        assert stats == pytest.approx(runs[0], rel=1e-3, abs=1e-5)


# --- gradients --------------------------------------------------------------------------------------------


def test_max_grad_norm_clips_for_real(tmp_path):
    """With SGD at rate 1 the weights move by exactly the clipped gradient. TRL never clips."""

    def unit(model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    free = tiny_update(tmp_path, optimizer=unit)
    before = free.weights().double()
    free_stats = free.run()
    free_move = free.weights().double() - before
    assert float(free_move.norm()) == pytest.approx(free_stats["grad_norm"], rel=1e-3)
    assert free_stats["grad_norm"] > 0.1

    clipped = tiny_update(tmp_path, optimizer=unit, max_grad_norm=0.01)
    clipped_stats = clipped.run()
    move = clipped.weights().double() - before
    assert clipped_stats["grad_norm"] == pytest.approx(free_stats["grad_norm"], rel=1e-4)  # before clipping
    assert float(move.norm()) == pytest.approx(0.01, rel=1e-2)
    cosine = torch.dot(move, free_move) / (move.norm() * free_move.norm())
    assert float(cosine) == pytest.approx(1.0, abs=1e-3)

    loose = tiny_update(tmp_path, optimizer=unit, max_grad_norm=1e6)
    loose.run()
    assert torch.allclose(loose.weights(), free.weights(), atol=1e-7)


def test_grad_norm_is_averaged_over_the_steps(tmp_path):
    update = tiny_update(tmp_path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    norms = []

    def remember(*_):
        norms.append(torch.cat([p.grad.flatten() for p in update.model.parameters()]).norm().item())

    update.optimizer.register_step_pre_hook(remember)
    stats = update.run(num_minibatches=4, microbatch_size=1)
    assert len(norms) == 4
    assert stats["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)


def test_the_result_does_not_depend_on_the_microbatch_size(tmp_path):
    """Rows of 1 to 8 tokens: a mean per micro-batch, as in TRL, would weigh their tokens unequally."""
    results = []
    for microbatch_size in (1, 2, 3, 8):
        update = tiny_update(tmp_path)
        update.run(num_epochs=2, num_minibatches=2, microbatch_size=microbatch_size, entropy_coef=0.1)
        results.append(update.weights())
    moved = (results[0] - tiny_update(tmp_path).weights()).norm()
    for result in results[1:]:
        assert float((result - results[0]).norm() / moved) < 1e-4


def test_an_accumulation_setting_of_the_launcher_does_not_scale_the_gradient(tmp_path, monkeypatch):
    plain = tiny_update(tmp_path)
    plain.run(microbatch_size=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launched = tiny_update(tmp_path)
    launched.run(microbatch_size=2)
    assert torch.equal(launched.weights(), plain.weights())


def test_gradients_do_not_leak_from_one_step_into_the_next(tmp_path):
    """Two updates in a row: the second step's gradient is that of its own minibatch."""
    update = tiny_update(tmp_path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert update.run(step=1) == pytest.approx(update.run(step=1), rel=1e-6)


# --- the same again ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_bit_for_bit(tmp_path):
    """TRL shuffles with an unseeded generator."""
    results = []
    for noise in (0, 1):
        update = tiny_update(tmp_path, optimizer=adamw)
        np.random.seed(noise)
        torch.manual_seed(noise)
        for step in (1, 2):
            update.run(num_epochs=2, num_minibatches=4, seed=11, step=step)
        results.append(update.weights())
    assert torch.equal(*results)


def test_the_order_of_minibatches_depends_on_seed_and_step(tmp_path):
    update = tiny_update(tmp_path)
    for seed, step in [(0, 1), (0, 1), (1, 1), (0, 2)]:
        update.run(num_minibatches=4, seed=seed, step=step)
    first, again, other_seed, other_step = (
        tuple(map(tuple, update.minibatches[i : i + 4])) for i in (0, 4, 8, 12)
    )
    assert first == again
    assert len({first, other_seed, other_step}) == 3


# --- forced tokens ----------------------------------------------------------------------------------------


class HeadGradients:
    """Gradients of the loss with respect to the policy's logits and the critic's values, by row and token."""

    def __init__(self, update: Update) -> None:
        self.update = update
        num_rows, width = update.trajectory.responses.shape
        self.logits = torch.zeros(num_rows, width)
        self.values = torch.zeros(num_rows, width)
        update.model.policy.get_output_embeddings().register_forward_hook(self._on_logits)
        update.model.critic.register_forward_hook(self._on_values)

    def _on_logits(self, module, args, output: Tensor) -> None:
        rows, width = self.update.forwards[-1], self.update.widths[-1]
        assert output.shape[0] == len(rows) * width

        def keep(gradient: Tensor) -> None:
            self.logits[rows, :width] += gradient.view(len(rows), width, -1).abs().amax(dim=-1)

        output.register_hook(keep)

    def _on_values(self, module, args, output: Tensor) -> None:
        rows, width = self.update.forwards[-1], self.update.widths[-1]

        def keep(gradient: Tensor) -> None:
            before_response = gradient.shape[1] - width - 1
            self.values[rows, :width] += gradient[:, before_response : before_response + width].abs()
            outside = torch.cat(
                [gradient[:, :before_response], gradient[:, before_response + width :]], dim=1
            )
            assert not outside.any()

        output.register_hook(keep)


@pytest.fixture(params=["paper", "release"])
def masked_gradients(request, tmp_path) -> tuple[str, Update, HeadGradients]:
    update = tiny_update(tmp_path, masking=request.param)
    gradients = HeadGradients(update)
    update.run(microbatch_size=3, entropy_coef=0.1)
    return request.param, update, gradients


def test_forced_tokens_and_padding_get_no_policy_gradient(masked_gradients):
    _, update, gradients = masked_gradients
    action_mask = update.trajectory.action_mask
    assert bool((gradients.logits[action_mask] > 0).all())
    assert not gradients.logits[action_mask.logical_not()].any()


def test_forced_tokens_get_a_value_gradient_under_release_masking_only(masked_gradients):
    masking, update, gradients = masked_gradients
    trajectory = update.trajectory
    counted = trajectory.action_mask if masking == "paper" else trajectory.response_mask
    assert not gradients.values[counted.logical_not()].any()
    assert bool((gradients.values[counted] > 0).all())


@pytest.mark.parametrize("value", [-50.0, math.inf, math.nan])
def test_what_stands_on_forced_tokens_changes_no_weight(tmp_path, value):
    """Flip rewards, advantages and everything measured on forced tokens and padding: same weights, bit for bit."""
    plain, flipped = tiny_update(tmp_path), tiny_update(tmp_path)
    outside = flipped.trajectory.action_mask.logical_not()
    flipped.trajectory = dataclasses.replace(
        flipped.trajectory, logprobs=flipped.trajectory.logprobs.masked_fill(outside, value)
    )
    finite = value if math.isfinite(value) else 77.0  # GAE gives finite returns; values come from a forward
    flipped.trajectory = dataclasses.replace(
        flipped.trajectory, values=flipped.trajectory.values.masked_fill(outside, finite)
    )
    flipped.credit = flipped.credit._replace(
        advantages=flipped.credit.advantages.masked_fill(outside, finite),
        returns=flipped.credit.returns.masked_fill(outside, -finite),
    )
    for update in (plain, flipped):
        update.run(num_epochs=2, num_minibatches=2, entropy_coef=0.1)
    assert torch.equal(plain.weights(), flipped.weights())


def test_the_gradient_is_that_of_the_continuation_given_a_longer_prompt(tmp_path):
    """A reset is a longer context: the same rows with the prefix moved into the query give the same gradient."""
    reset = tiny_update(tmp_path)
    before = reset.weights()
    reset.run()

    moved = tiny_update(tmp_path)
    trajectory, credit = moved.trajectory, moved.credit
    queries, responses, columns = [], [], []
    for row, (length, h) in enumerate(zip(LENGTHS, FORCED, strict=True)):
        prompt = trajectory.queries[row][trajectory.query_mask[row]].tolist()
        tokens = trajectory.responses[row, :length].tolist()
        queries.append(prompt + tokens[:h])
        responses.append(tokens[h:])
        columns.append(list(range(h, length)))
    batch = pad_batch(queries, responses, 2)
    width = batch.responses.shape[1]

    def shifted(rows: Tensor) -> Tensor:
        result = torch.zeros(len(LENGTHS), width, dtype=rows.dtype)
        for row, kept in enumerate(columns):
            result[row, : len(kept)] = rows[row, kept]
        return result

    moved.trajectory = dataclasses.replace(
        trajectory,
        queries=batch.queries,
        query_mask=batch.query_mask,
        responses=batch.responses,
        response_mask=batch.response_mask,
        reset_lengths=torch.zeros_like(trajectory.reset_lengths),
        **{n: shifted(getattr(trajectory, n)) for n in ("logprobs", "ref_logprobs", "values", "entropy")},
    )
    moved.credit = credit._replace(
        **{
            n: shifted(getattr(credit, n))
            for n in ("kl", "advantages", "returns", "policy_mask", "value_mask")
        }
    )
    moved.run()
    distance = (moved.weights() - reset.weights()).norm() / (reset.weights() - before).norm()
    assert float(distance) < 1e-4


# --- leaving early, and the critic alone ------------------------------------------------------------------


def test_target_kl_leaves_the_update(tmp_path):
    assert tiny_update(tmp_path, off_policy=1.0).run(num_epochs=4, target_kl=0.1)["num_optimizer_steps"] == 1
    assert tiny_update(tmp_path).run(num_epochs=4, target_kl=1e9)["num_optimizer_steps"] == 4


def test_target_kl_is_not_met_before_the_policy_moves(tmp_path):
    update = tiny_update(tmp_path, optimizer=adamw)
    stats = update.run(num_epochs=8, num_minibatches=1, target_kl=1e-4)
    assert 1 < stats["num_optimizer_steps"] < 8
    assert len(update.minibatches) == stats["num_optimizer_steps"]


def test_train_policy_false_leaves_the_policy_bit_for_bit(tmp_path):
    update = tiny_update(tmp_path, optimizer=adamw, off_policy=0.3)
    policy, critic = update.weights("policy"), update.weights("critic")
    stats = update.run(num_epochs=2, num_minibatches=2, train_policy=False, entropy_coef=0.1)
    assert torch.equal(update.weights("policy"), policy)
    assert not torch.equal(update.weights("critic"), critic)
    assert stats["num_optimizer_steps"] == 4


def test_the_critic_learns_alike_whether_or_not_the_policy_does(tmp_path):
    alone, together = tiny_update(tmp_path), tiny_update(tmp_path)
    alone.run(train_policy=False)
    together.run(train_policy=True)
    assert torch.equal(alone.weights("critic"), together.weights("critic"))


def test_the_entropy_bonus_raises_entropy(tmp_path):
    def entropy_of(update: Update) -> float:
        with torch.no_grad():
            scores = response_logprobs(
                update.model.policy, update.trajectory.batch, temperature=0.7, entropy=True
            )
        return float(scores.entropy[update.trajectory.action_mask].mean())

    results = {}
    for coef in (0.0, 5.0):
        update = tiny_update(tmp_path, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
        update.run(entropy_coef=coef)
        results[coef] = entropy_of(update)
    assert results[5.0] > results[0.0]


# --- not finite -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_row_and_takes_no_step(tmp_path):
    update = tiny_update(tmp_path)
    advantages = update.credit.advantages.clone()
    advantages[5, 2] = math.nan
    update.credit = update.credit._replace(advantages=advantages)
    before = update.weights()
    with pytest.raises(FloatingPointError, match=r"step 7: the loss is not finite in row\(s\) 5 of rank 0"):
        update.run(step=7, microbatch_size=3)
    assert torch.equal(update.weights(), before)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    update = tiny_update(tmp_path)
    next(update.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="step 3: the gradient norm is not finite"):
        update.run(step=3)


def test_a_reward_that_is_not_finite_names_step_row_and_origin(tmp_path):
    update = tiny_update(tmp_path)
    scores = torch.tensor([1.0, math.inf, 0.0, math.nan])
    origins = [f"posts.jsonl:{line}" for line in (11, 12, 13, 14)]
    with pytest.raises(FloatingPointError) as error:
        finite_or_stop(update.engine, tmp_path, 9, scores, "the reward", origins)
    message = str(error.value)
    assert "step 9: the reward" in message
    assert "1 (posts.jsonl:12)" in message and "3 (posts.jsonl:14)" in message
    assert "posts.jsonl:11" not in message and "posts.jsonl:13" not in message
    assert "last checkpoint: none" in message
    finite_or_stop(update.engine, tmp_path, 9, torch.zeros(3), "the reward")


# --- rollouts of another engine ---------------------------------------------------------------------------


def with_engine_logprobs(update: Update) -> list[list[float]]:
    """Give the rollouts log-probs of an engine that are off by up to 1 nat; return pi / mu of each token."""
    generator = torch.Generator().manual_seed(7)
    difference = 2 * torch.rand(update.trajectory.logprobs.shape, generator=generator) - 1
    engine_logprobs = update.trajectory.logprobs - difference
    update.trajectory = dataclasses.replace(update.trajectory, engine_logprobs=engine_logprobs)
    return [[math.exp(d) for d in row] for row in difference.tolist()]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_scale_the_advantages_of_the_policy_alone(tmp_path, level):
    """w max(-A r, -A clip(r)) is the loss of the advantage w A; values know no weight."""
    cap = 1.5
    weighted, plain = tiny_update(tmp_path), tiny_update(tmp_path)
    ratios = with_engine_logprobs(weighted)
    mask = weighted.credit.policy_mask
    advantages, weights = plain.credit.advantages.clone(), []
    for row, sampled in enumerate(mask.tolist()):
        product = math.prod(ratio for ratio, counts in zip(ratios[row], sampled, strict=True) if counts)
        for t, counts in enumerate(sampled):
            if counts:
                weights.append(min(ratios[row][t] if level == "token" else product, cap))
                advantages[row, t] *= weights[-1]
    plain.credit = plain.credit._replace(advantages=advantages)
    settings = {"num_epochs": 2, "num_minibatches": 1, "microbatch_size": 3}
    found = weighted.run(importance_sampling=level, importance_cap=cap, **settings)
    expected = plain.run(**settings)
    torch.testing.assert_close(weighted.weights(), plain.weights(), atol=1e-6, rtol=0)
    assert found["importance_weight"] == pytest.approx(np.mean(weights), rel=1e-5)
    assert found["importance_truncated"] == pytest.approx(np.mean([w == cap for w in weights]), rel=1e-5)
    assert 0 < found["importance_truncated"] < 1
    assert found["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-5)
    assert found.keys() - expected.keys() == {"importance_weight", "importance_truncated"}


def test_engine_logprobs_change_nothing_without_importance_sampling(tmp_path):
    given, plain = tiny_update(tmp_path), tiny_update(tmp_path)
    with_engine_logprobs(given)
    assert given.run(num_epochs=2) == plain.run(num_epochs=2)
    assert torch.equal(given.weights(), plain.weights())


# --- nothing is changed in place, and settings ------------------------------------------------------------


def test_rollouts_and_credit_are_not_changed(tmp_path):
    update = tiny_update(tmp_path)
    fields = {f.name: getattr(update.trajectory, f.name) for f in dataclasses.fields(update.trajectory)}
    rollouts = {name: value.clone() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    credit = [None if tensor is None else tensor.clone() for tensor in update.credit]
    update.run(num_epochs=2, num_minibatches=2, entropy_coef=0.1)
    assert all(torch.equal(getattr(update.trajectory, name), value) for name, value in rollouts.items())
    assert all(x is y or torch.equal(x, y) for x, y in zip(update.credit, credit, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_epochs": 0},
        {"num_minibatches": 0},
        {"microbatch_size": 0},
        {"clip_range": 0.0},
        {"clip_range_high": 0.0},
        {"dual_clip": 1.0},
        {"value_clip_range": -1.0},
        {"value_coef": -0.1},
        {"entropy_coef": -0.1},
        {"target_kl": 0.0},
    ],
)
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be "):
        PPOConfig(**settings)
