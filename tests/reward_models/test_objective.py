"""The loss of a reward model against scores of single rows, one forward over a prompt, and its parts by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model

from drpo.models.adapters import add_lora
from reward_models.model import RewardModel
from reward_models.objective import RewardObjective
from reward_models.rankings import Ranking
from reward_models.train import LossConfig, lm_head_of

STOP, PAD = 1, 2
RANKINGS = [
    Ranking([3, 4, 5], [[11, 12, STOP], [13, STOP]], [(0, 1, 2.0)], [0, 1]),
    Ranking([7] * 9, [[14, STOP], [15, 16, 17, 18, STOP], [12, STOP]], [(1, 0, 1.0), (1, 2, 3.0), (0, 2, 2.0)],
            [1, 0, 2]),
    Ranking([10], [[20, 21, 22, STOP], [20, 21, 23, STOP]], [(1, 0, 0.5)], [1, 0]),
]  # fmt: skip


def score_alone(model: RewardModel, query: list[int], response: list[int]) -> float:
    """From the backbone's hidden states of one row without padding."""
    with torch.no_grad():
        hidden = model.backbone(torch.tensor([query + response])).last_hidden_state[0, len(query) :].double()
    outputs = [float(h @ model.head.weight[0].double() + model.head.bias.double()) for h in hidden]
    return sum(outputs) if model.config.aggregation == "sum" else outputs[-1]


def scores_alone(model: RewardModel, ranking: Ranking) -> list[float]:
    return [score_alone(model, ranking.query_ids, response) for response in ranking.response_ids]


def objective_of(penalty: float = 0.0, aggregation: str = "last", **loss) -> RewardObjective:
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox"), seed=3)
    model.config.aggregation = aggregation
    return RewardObjective(model, PAD, LossConfig(**loss), penalty, torch.device("cpu"))


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize("aggregation", ["last", "sum"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_loss_of_a_ranking_is_the_mean_over_its_comparisons(aggregation, penalty):
    objective = objective_of(penalty, aggregation)
    losses, rows = objective(objective.collate(RANKINGS))
    for place, ranking in enumerate(RANKINGS):
        scores = scores_alone(objective.model, ranking)
        margins = [scores[better] - scores[worse] for better, worse, _ in ranking.comparisons]
        expected = sum(map(minus_log_sigmoid, margins)) / len(margins)
        expected += penalty * sum(score**2 for score in scores) / len(scores)
        assert losses[place].item() == pytest.approx(expected, rel=1e-4)
        assert rows["margin"][place].item() == pytest.approx(sum(margins) / len(margins), rel=1e-3, abs=1e-5)
        assert rows["accuracy"][place].item() == pytest.approx(sum(m > 0 for m in margins) / len(margins))
        better = [scores[better] for better, _, _ in ranking.comparisons]
        assert rows["chosen_score"][place].item() == pytest.approx(sum(better) / len(better), rel=1e-4)
        worse = [scores[worse] for _, worse, _ in ranking.comparisons]
        assert rows["rejected_score"][place].item() == pytest.approx(sum(worse) / len(worse), rel=1e-4)
    if aggregation == "last":
        assert 0 < rows["accuracy"].mean() < 1  # these rankings have both


def test_margins_and_smoothing_change_the_loss_as_they_should():
    objective = objective_of(margin_scale=0.5, label_smoothing=0.1)
    losses, _ = objective(objective.collate(RANKINGS))
    for place, ranking in enumerate(RANKINGS):
        scores, terms = scores_alone(objective.model, ranking), []
        for better, worse, gap in ranking.comparisons:
            margin = scores[better] - scores[worse] - 0.5 * gap
            terms.append(0.9 * minus_log_sigmoid(margin) + 0.1 * minus_log_sigmoid(-margin))
        assert losses[place].item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_plackett_luce_draws_the_responses_in_their_order():
    objective = objective_of(name="plackett_luce")
    losses, _ = objective(objective.collate(RANKINGS))
    for place, ranking in enumerate(RANKINGS):
        scores = scores_alone(objective.model, ranking)
        order = sorted(range(len(scores)), key=lambda k: ranking.ranks[k])
        weights = [math.exp(scores[k]) for k in order]
        chance = math.prod(weight / sum(weights[k:]) for k, weight in enumerate(weights))
        assert losses[place].item() == pytest.approx(-math.log(chance), rel=1e-4)


def test_prompts_are_computed_once():
    objective = objective_of()
    seen = []
    objective.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    objective.before_lengths(RANKINGS)
    assert objective.lengths(RANKINGS[1]) == (9, 15)
    seen.clear()
    objective(objective.collate(RANKINGS[1:2]))
    assert seen == [(1, 9 + 2 + 5 + 2)]


def test_rows_apart_give_the_same_where_prompts_cannot_be_shared():
    objective = objective_of()
    batch = objective.collate(RANKINGS)
    shared, _ = objective(batch)
    shared.sum().backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    objective.model.backbone.set_attn_implementation("eager")
    objective.model.backbone.config.alibi = True  # attention that takes no packed rows
    losses, _ = objective(batch)
    losses.sum().backward()
    torch.testing.assert_close(losses, shared, atol=1e-5, rtol=1e-5)
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_loss_is_that_of_the_best_response(tied):
    policy = tiny_model("gpt_neox", tie_word_embeddings=tied)
    model = RewardModel.from_causal_lm(policy, seed=3)
    reference = tiny_model("gpt_neox", tie_word_embeddings=tied)
    head = lm_head_of(policy, model)
    assert (head.weight is model.backbone.get_input_embeddings().weight) == tied
    assert head.weight.requires_grad == tied
    objective = RewardObjective(model, PAD, LossConfig(lm_coef=0.25), 0.0, torch.device("cpu"), head)
    losses, rows = objective(objective.collate(RANKINGS))
    without = objective_of()
    without.model.load_state_dict(model.state_dict())
    plain, _ = without(without.collate(RANKINGS))
    for place, ranking in enumerate(RANKINGS):
        best = ranking.response_ids[ranking.ranks.index(0)]
        ids = torch.tensor([ranking.query_ids + best])
        with torch.no_grad():
            logprobs = reference(ids).logits[0, len(ranking.query_ids) - 1 : -1].log_softmax(-1)
        expected = -sum(float(logprobs[t, token]) for t, token in enumerate(best)) / len(best)
        assert rows["lm_loss"][place].item() == pytest.approx(expected, rel=1e-4)
        assert losses[place].item() == pytest.approx(plain[place].item() + 0.25 * expected, rel=1e-4)
    losses.sum().backward()
    assert tied or head.weight.grad is None


def test_a_model_that_scores_everything_alike_loses_log_two_and_wins_no_pair():
    objective = objective_of()
    with torch.no_grad():
        objective.model.head.weight.zero_()
    losses, rows = objective(objective.collate(RANKINGS))
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert not rows["accuracy"].any()


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_score(with_lora):
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox"), seed=3)
    if with_lora:
        model = add_lora(model, r=2, alpha=4.0, target_modules=None, seed=0, trained_whole=("head",))
    objective = RewardObjective(model, PAD, LossConfig(), 0.0, torch.device("cpu"))
    batch = objective.collate(RANKINGS)
    losses, rows = objective(batch)
    losses.sum().backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-4 * parameter.grad)
    assert objective(batch)[1]["margin"].sum() > rows["margin"].sum()
