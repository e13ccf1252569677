"""Training a reward model: the loss of pairs, accuracy, and the zero of the score."""

from __future__ import annotations

import json
import math

import pytest
import torch
from offline_runs import run_reward_model
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoTokenizer

from drpo.data.encode import Example, encode_query, encode_response
from drpo.data.load import load_examples
from drpo.data.records import DataError, Record
from drpo.models.loading import ModelConfig
from reward_models.model import RewardModel
from reward_models.train import RewardModelRecipe, RewardObjective, ScoreConfig

STOP, PAD = 1, 2
PAIRS = [
    Example(Record("a"), [3, 4, 5], chosen_ids=[11, 12, STOP], rejected_ids=[13, STOP]),
    Example(Record("b"), [7] * 9, chosen_ids=[14, STOP], rejected_ids=[15, 16, 17, 18, STOP]),
    Example(Record("c"), [10], chosen_ids=[20, 21, 22, STOP], rejected_ids=[20, 21, 23, STOP]),
]


def score_alone(model: RewardModel, query: list[int], response: list[int]) -> float:
    """From the backbone's hidden states of one row without padding."""
    with torch.no_grad():
        hidden = model.backbone(torch.tensor([query + response])).last_hidden_state[0, len(query) :].double()
        outputs = [float(h @ model.head.weight[0].double() + model.head.bias.double()) for h in hidden]
    counted = outputs if model.config.aggregation == "sum" else outputs[-1:]
    return sum(counted) - model.config.centre


def log_loss(chosen: float, rejected: float) -> float:
    """-log sigmoid(chosen - rejected)."""
    return math.log1p(math.exp(rejected - chosen))


def pair_objective(aggregation: str = "last", penalty: float = 0.0) -> RewardObjective:
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox"), seed=3)
    model.config.aggregation = aggregation
    return RewardObjective(model, PAD, penalty, torch.device("cpu"))


@pytest.mark.parametrize("aggregation", ["last", "sum"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_loss_of_pairs_by_hand(aggregation, penalty):
    objective = pair_objective(aggregation, penalty)
    batch = objective.collate(PAIRS)
    assert objective.num_targets(batch) == 3
    losses, rows = objective(batch)
    chosen = [score_alone(objective.model, pair.query_ids, pair.chosen_ids) for pair in PAIRS]
    rejected = [score_alone(objective.model, pair.query_ids, pair.rejected_ids) for pair in PAIRS]
    expected = [log_loss(c, r) + penalty * (c**2 + r**2) / 2 for c, r in zip(chosen, rejected, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    wins = [c > r for c, r in zip(chosen, rejected, strict=True)]
    assert rows["accuracy"].tolist() == wins
    assert 0 < sum(wins) < 3  # these pairs have both
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert rows["margin"].tolist() == pytest.approx(margins, rel=1e-4)
    assert rows["chosen_score"].tolist() == pytest.approx(chosen, rel=1e-4)
    assert rows["rejected_score"].tolist() == pytest.approx(rejected, rel=1e-4)


def test_a_model_that_scores_everything_alike_loses_log_two_and_wins_no_pair():
    objective = pair_objective()
    with torch.no_grad():
        objective.model.head.weight.zero_()
    losses, rows = objective(objective.collate(PAIRS))
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)
    assert not rows["accuracy"].any()


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_score():
    objective = pair_objective()
    model, batch = objective.model, objective.collate(PAIRS)
    before = objective(batch)[1]["margin"].sum()
    objective(batch)[0].sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-4 * parameter.grad)
    assert objective(batch)[1]["margin"].sum() > before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the references of the data, its recipe, metrics, model and tokenizer."""
    folder = tmp_path_factory.mktemp("reward_model") / "run"
    recipe, rows = run_reward_model(
        folder, score={"num_references": 17, "aggregation": "sum"}, eval={"every": 2, "num_examples": 10}
    )
    return recipe, rows, *loaded(folder)


def loaded(folder) -> tuple[RewardModel, AutoTokenizer]:
    path = folder / "reward_model"
    return RewardModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def test_the_last_evaluation_is_that_of_the_saved_model(finished):
    recipe, rows, model, tokenizer = finished
    held_out = load_examples(recipe.data, tokenizer, "pairs").eval[:10]
    chosen = [score_alone(model, pair.query_ids, pair.chosen_ids) for pair in held_out]
    rejected = [score_alone(model, pair.query_ids, pair.rejected_ids) for pair in held_out]
    pairs = list(zip(chosen, rejected, strict=True))
    assert rows[-1]["eval/accuracy"] == sum(c > r for c, r in pairs) / 10
    assert rows[-1]["eval/loss"] == pytest.approx(sum(log_loss(c, r) for c, r in pairs) / 10, rel=1e-4)
    assert rows[-1]["eval/margin"] == pytest.approx(sum(c - r for c, r in pairs) / 10, rel=1e-3)
    assert rows[0]["train/num_targets"] == 8


def test_the_references_score_zero_on_average_when_scored_again(finished):
    recipe, _, model, tokenizer = finished
    references = load_examples(recipe.data, tokenizer, "prompts").train[:17]
    scores = [score_alone(model, e.query_ids, e.completion_ids) for e in references]
    assert sum(scores) / 17 == pytest.approx(0, abs=1e-4)
    assert max(map(abs, scores)) > 0.1
    assert model.config.centre != 0


def test_no_centring_leaves_the_score_where_it_is(tmp_path):
    unread = {"task": "own", "path": str(tmp_path / "nowhere.jsonl")}
    run_reward_model(tmp_path / "run", score={"num_references": 0}, references=unread, num_steps=1)
    assert loaded(tmp_path / "run")[0].config.centre == 0


def test_other_references_fix_the_zero(tmp_path):
    rows = [{"prompt": f"post {i}", "completion": " a good summary" * (1 + i % 3)} for i in range(9)]
    data = tmp_path / "references.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    references = {"task": "own", "path": str(data), "eval_fraction": 0.0}
    run_reward_model(tmp_path / "run", references=references, num_steps=1)
    model, tokenizer = loaded(tmp_path / "run")
    scores = [
        score_alone(
            model, encode_query(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"])
        )
        for row in rows
    ]
    assert sum(scores) / 9 == pytest.approx(0, abs=1e-4)


def test_bad_references_are_reported_with_the_key_of_their_section(tmp_path):
    data = tmp_path / "references.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"post {i}", "completion": i}) for i in range(9)))
    references = {"task": "own", "path": str(data), "eval_fraction": 0.0}
    with pytest.raises(DataError, match="more than references.max_bad_fraction=0"):
        run_reward_model(tmp_path / "run", references=references, num_steps=1)


def test_noise_is_put_on_the_pairs_and_not_on_the_references(tmp_path, capsys):
    """The references are prompts with responses, to which the noise of pairs does not apply."""
    centres = []
    for name, data in (("clean", {}), ("noisy", {"noise": {"flip_rate": 0.4}})):
        run_reward_model(tmp_path / name, num_steps=1, data=data, optim={"learning_rate": 1e-9})
        centres.append(loaded(tmp_path / name)[0].config.centre)
    assert "noise: 18 of 40 pairs flipped" in capsys.readouterr().out
    assert centres[0] == pytest.approx(centres[1], rel=1e-4) and centres[0] != 0


def test_references_without_responses_are_refused_before_training(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"post {i}"}) for i in range(9)))
    references = {"task": "own", "path": str(data), "eval_fraction": 0.0}
    with pytest.raises(DataError, match="prompts.jsonl:1 has no response that could be a reference"):
        run_reward_model(tmp_path / "run", references=references)
    assert not (tmp_path / "run").exists()


def test_micro_batches_do_not_change_the_result(tmp_path):
    weights = []
    for cut in ({"microbatch_size": 8}, {"microbatch_size": 1}, {"microbatch_tokens": 100}):
        folder = tmp_path / str(len(weights))
        run_reward_model(folder, batch=cut)
        weights.append(load_file(folder / "reward_model" / "model.safetensors"))
    for others in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(others[name], weight, atol=1e-4, rtol=0, msg=name)


def test_it_learns_its_pairs(tmp_path):
    """16 pairs seen over and over are told apart."""
    _, rows = run_reward_model(
        tmp_path / "run",
        num_steps=40,
        data={"demo": {"num_train": 16}},
        batch={"size": 16, "microbatch_size": 16},
    )
    assert rows[0]["train/accuracy"] < 0.9
    assert rows[-1]["train/accuracy"] > 0.95
    assert rows[-1]["train/loss"] < 0.2


def test_the_penalty_keeps_scores_near_zero(tmp_path):
    sizes = []
    for penalty in (0.0, 1.0):
        _, rows = run_reward_model(tmp_path / str(penalty), num_steps=20, score={"penalty": penalty})
        sizes.append(abs(rows[-1]["train/chosen_score"]) + abs(rows[-1]["train/rejected_score"]))
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("changes", [{"penalty": -1.0}, {"num_references": -1}])
def test_score_values_are_checked(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be >= 0"):
        ScoreConfig(**changes)


def test_adapters_are_refused():
    lora = type(ModelConfig().lora)(r=4)
    with pytest.raises(ValueError, match="^model.lora.r must be 0: a reward model is trained in full"):
        RewardModelRecipe(model=ModelConfig(path="x", lora=lora))
