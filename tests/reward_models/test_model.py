"""The reward model's score: which head outputs count, where its zero is, and that padding does not matter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModel

from drpo.config import ConfigError
from drpo.models.loading import ModelConfig, load_critic, load_scalar_model
from drpo.tensors import pad_batch
from reward_models.model import RewardModel, RewardModelConfig, aggregate

STOP, PAD = 1, 2
QUERIES = [[3, 4, 5], [7] * 11, [9, 8, 7, 6, 5, 4, 3], [10]]
RESPONSES = [[11, 12, STOP], [13], [14, 15, 16, 17, STOP], [20, 21, 22, 23]]
OUTPUTS = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])


def reward_model(aggregation="last", model_type="gpt_neox", centre=0.0) -> RewardModel:
    model = RewardModel.from_causal_lm(tiny_model(model_type), seed=3).eval()
    model.config.aggregation, model.config.centre = aggregation, centre
    with torch.no_grad():
        model.head.bias.fill_(0.25)
    return model


def outputs_alone(model: RewardModel, query: list[int], response: list[int]) -> list[float]:
    """The head on the backbone's hidden states at the response tokens, of one row without any padding."""
    with torch.no_grad():
        hidden = model.backbone(torch.tensor([query + response])).last_hidden_state[0, len(query) :]
        return [float((h * model.head.weight[0]).sum()) + float(model.head.bias) for h in hidden]


@torch.no_grad()
def scores_of(model: RewardModel, queries=QUERIES, responses=RESPONSES, **lengths) -> list[float]:
    return model.score(pad_batch(queries, responses, PAD, **lengths)).tolist()


def test_aggregates_by_hand():
    assert aggregate(OUTPUTS, MASK, "last").tolist() == [2.0, 32.0, 64.0]
    assert aggregate(OUTPUTS, MASK, "sum").tolist() == [3.0, 56.0, 64.0]


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_outputs_under_padding_are_not_read(aggregation):
    spoiled = torch.where(MASK, OUTPUTS, torch.nan)
    expected = aggregate(OUTPUTS, MASK, aggregation)
    assert torch.equal(aggregate(spoiled, MASK, aggregation), expected)


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_the_gradient_reaches_the_outputs_that_count(aggregation):
    outputs = OUTPUTS.clone().requires_grad_()
    aggregate(outputs, MASK, aggregation).sum().backward()
    counts = MASK if aggregation == "sum" else torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert torch.equal(outputs.grad, counts.float())


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_a_response_without_tokens_has_no_score(aggregation):
    mask = MASK.clone()
    mask[1] = False
    with pytest.raises(ValueError, match=r"rows \[1\] have no token"):
        aggregate(OUTPUTS, mask, aggregation)


def test_another_aggregation_is_refused():
    with pytest.raises(ValueError, match="last or sum, got 'mean'"):
        RewardModelConfig(aggregation="mean")


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "opt", "llama"])
@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_scores_are_those_of_each_row_alone_at_any_padding(model_type, aggregation):
    model = reward_model(aggregation, model_type)
    alone = [
        outputs_alone(model, query, response) for query, response in zip(QUERIES, RESPONSES, strict=True)
    ]
    expected = [sum(outputs) if aggregation == "sum" else outputs[-1] for outputs in alone]
    assert scores_of(model) == pytest.approx(expected, abs=2e-5)
    assert scores_of(model, query_length=16, response_length=9) == pytest.approx(expected, abs=2e-5)
    for row, query, response in zip(range(4), QUERIES, RESPONSES, strict=True):
        assert scores_of(model, [query], [response]) == pytest.approx([expected[row]], abs=2e-5)


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_the_stop_token_counts(aggregation):
    model = reward_model(aggregation)
    query, body = [3, 4, 5], [11, 12]
    outputs = outputs_alone(model, query, [*body, STOP])
    ended, cut = scores_of(model, [query, query], [[*body, STOP], body])
    assert ended - cut == pytest.approx(outputs[2] - (outputs[1] if aggregation == "last" else 0), abs=1e-5)
    assert abs(ended - cut) > 1e-2


def test_a_token_with_the_id_of_padding_counts_where_the_mask_says_so():
    model = reward_model("sum")
    expected = sum(outputs_alone(model, [3, PAD], [PAD, 5]))
    assert scores_of(model, [[3, PAD], [4] * 5], [[PAD, 5], [6] * 7])[0] == pytest.approx(expected, abs=1e-5)


def test_centre_is_taken_off_every_score():
    plain, centred = scores_of(reward_model()), scores_of(reward_model(centre=1.5))
    assert centred == pytest.approx([score - 1.5 for score in plain], abs=1e-6)


def test_scores_are_float32_also_of_bfloat16_weights():
    model = reward_model().to(torch.bfloat16)
    assert model.score(pad_batch(QUERIES, RESPONSES, PAD)).dtype == torch.float32


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_saved_and_loaded_in_every_way_it_scores_the_same(aggregation, tmp_path):
    model = reward_model(aggregation, centre=-0.75)
    model.save_pretrained(tmp_path)
    for loaded in (
        RewardModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
        load_scalar_model(tmp_path, ModelConfig(), RewardModel),
    ):
        assert type(loaded) is RewardModel
        assert (loaded.config.aggregation, loaded.config.centre) == (aggregation, -0.75)
        assert scores_of(loaded) == scores_of(model)


def test_a_critic_from_a_reward_model_starts_on_the_scale_of_its_centred_score(tmp_path):
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox"), seed=3).eval()
    model.config.centre = 3.0
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        outputs = model(ids)
        values = load_critic(str(tmp_path), ModelConfig()).eval()(ids)
    torch.testing.assert_close(values, outputs - 3.0)


def test_a_reward_model_that_sums_over_tokens_is_no_critic(tmp_path):
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox"), seed=3)
    model.config.aggregation = "sum"
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="critic.path.*sums its head.*critic.path=null"):
        load_critic(str(tmp_path), ModelConfig())
