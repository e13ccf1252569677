"""Whole online runs whose micro-batches are cut in different ways: by rows, by tokens, with shared prompts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model

from drpo.microbatches import sharing_saves
from drpo.models.actor_critic import ActorCritic
from drpo.trainers.online_models import rollouts_together
from drpo.trainers.online_recipe import OnlineRecipe

ONE = {"num_epochs": 2, "num_minibatches": 1}
GROUPS = {"rollout": {"rollouts_per_prompt": 4}}
MODELS = {
    "all weights": {},
    "lora": {"lora": {"r": 2}},
    "frozen trunk": {"trainable_layers": 1},
    "lora on a frozen trunk": {"trainable_layers": 1, "lora": {"r": 2}},
}


@pytest.fixture
def forward_shapes(monkeypatch) -> list[tuple[int, int, int]]:
    """Rows, tokens of padding included, and rows to a prompt of every forward of the actor-critic."""
    shapes = []
    forward = ActorCritic.forward

    def watched(self, queries, query_mask, responses, response_mask, trunk=None, num_continuations=1):
        shapes.append((len(queries), queries.shape[1] + responses.shape[1], num_continuations))
        return forward(self, queries, query_mask, responses, response_mask, trunk, num_continuations)

    monkeypatch.setattr(ActorCritic, "forward", watched)
    return shapes


def assert_same_runs(left, right) -> None:
    (rows, folder), (other_rows, other_folder) = left, right
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith(("time/", "perf/")):
                assert row[name] == pytest.approx(other[name], rel=2e-4, abs=2e-4), name
    weights, others = (load_file(run / "policy" / "model.safetensors") for run in (folder, other_folder))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-4, rtol=0, msg=name)


def test_microbatches_of_tokens_give_the_run_of_rows(online_run, forward_shapes):
    by_rows = online_run(ppo=ONE)
    row_shapes = forward_shapes.copy()
    forward_shapes.clear()
    by_tokens = online_run(ppo={**ONE, "microbatch_tokens": 500})
    assert_same_runs(by_rows, by_tokens)
    assert all(rows <= 4 for rows, _, _ in row_shapes) and any(rows > 4 for rows, _, _ in forward_shapes)
    assert all(rows * width <= 500 for rows, width, _ in forward_shapes)


def test_a_forward_is_as_wide_as_its_own_longest_row(online_run, forward_shapes):
    rows, _ = online_run(ppo={**ONE, "microbatch_size": 1})
    assert len({width for _, width, _ in forward_shapes}) > 3, "else the lengths do not differ"


@pytest.mark.parametrize("reset", [{}, {"proportion": 1.0, "per": "prompt"}], ids=["beta 0.5", "one state"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_shared_prompts_give_the_run_of_separate_rows(model, reset, online_run, forward_shapes):
    changes = {"model": model, "reset": reset}
    shared = online_run(ppo={**ONE, "microbatch_size": 8}, **GROUPS, **changes)
    assert {num for _, _, num in forward_shapes} == {4}
    forward_shapes.clear()
    separate = online_run(ppo={**ONE, "microbatch_size": 8, "share_prompts": False}, **GROUPS, **changes)
    assert {num for _, _, num in forward_shapes} == {1}
    assert_same_runs(shared, separate)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": {"microbatch_tokens": 250}},
        {**GROUPS, "ppo": {"microbatch_size": 8}},
        {**GROUPS, "ppo": {"microbatch_size": 8}, "model": {"trainable_layers": 1}},
    ],
    ids=["tokens", "shared", "shared over a frozen trunk"],
)
def test_the_first_ratio_is_exactly_one(online_run, precision, changes):
    changes = {**changes, "ppo": {**changes["ppo"], "num_epochs": 1, "num_minibatches": 1}}
    rows, _ = online_run(engine={"mixed_precision": precision}, **changes)
    for row in rows:
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-6) and row["ppo/clip_fraction"] == 0.0
        assert row["ppo/approx_kl"] < 1e-10
    assert rows[-1]["objective/kl_k3"] > 1e-4  # and the policy did move


def test_rollouts_of_a_prompt_stay_in_one_minibatch(online_run, forward_shapes):
    online_run(ppo={"num_minibatches": 2, "microbatch_size": 4}, **GROUPS)
    assert {(rows, num) for rows, _, num in forward_shapes} == {(4, 4)}


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": {"num_minibatches": 8, "microbatch_size": 8}},  # minibatches of 2
        {"ppo": {"microbatch_size": 2}},
        {"rollout": {"max_response_length": 40}},
    ],
    ids=["minibatches", "forwards", "long responses"],
)
def test_rollouts_are_separate_rows_where_sharing_cannot_be_or_costs_more(
    online_run, forward_shapes, changes
):
    reward = [1.0] * 16
    both = {name: {**changes.get(name, {}), **GROUPS.get(name, {})} for name in {*changes, *GROUPS}}
    online_run(lambda completions: reward[: len(completions)], num_steps=1, **both)
    assert {num for _, _, num in forward_shapes} == {1}


def test_sharing_saves_while_responses_are_short_beside_the_prompt():
    """(Q + K R)^2 <= K (Q + R)^2: 468^2 = 219,024 <= 4 * 309^2 = 381,924; 2080^2 > 8 * 288^2."""
    assert sharing_saves([(256, 53)] * 4, 4)
    assert not sharing_saves([(32, 256)] * 8, 8)


def test_a_window_that_shared_rows_may_pass_is_known_before_the_first():
    """So that all processes take one way, whatever rows they have."""
    recipe = OnlineRecipe(rollout={"batch_size": 8, "rollouts_per_prompt": 4, "max_response_length": 10})
    narrow, wide = (tiny_model("mistral", sliding_window=window) for window in (59, 60))
    assert rollouts_together(recipe, 20, [wide]) == 4  # 20 + 4 * 10
    assert rollouts_together(recipe, 20, [wide, narrow]) == 1
