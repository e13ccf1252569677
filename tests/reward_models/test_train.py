"""Training a reward model: the loss of pairs, accuracy, and the zero of the score."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from offline_runs import RECIPE, run_offline, run_reward_model
from online_runs import save_tiny_policy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from drpo.data.encode import encode_query, encode_response
from drpo.data.load import load_examples
from drpo.data.records import DataError
from reward_models.model import RewardModel
from reward_models.train import RewardModelRecipe, ScoreConfig, train


def score_alone(model: RewardModel, query: list[int], response: list[int]) -> float:
    """From the backbone's hidden states of one row without padding."""
    with torch.no_grad():
        hidden = model.backbone(torch.tensor([query + response])).last_hidden_state[0, len(query) :].double()
        outputs = [float(h @ model.head.weight[0].double() + model.head.bias.double()) for h in hidden]
    counted = outputs if model.config.aggregation == "sum" else outputs[-1:]
    return (sum(counted) - model.config.centre) / model.config.scale


def log_loss(chosen: float, rejected: float) -> float:
    """-log sigmoid(chosen - rejected)."""
    return math.log1p(math.exp(rejected - chosen))


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
    references = load_examples(recipe.data, tokenizer, "prompts").eval
    assert len(references) == 11  # all that is held out
    scores = [score_alone(model, e.query_ids, e.completion_ids) for e in references]
    assert sum(scores) / 11 == pytest.approx(0, abs=1e-4)
    assert max(map(abs, scores)) > 0.1
    assert model.config.centre != 0 and model.config.scale == 1


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


def test_unit_variance_scales_the_references_to_deviation_one(tmp_path):
    recipe, _ = run_reward_model(tmp_path / "run", score={"unit_variance": True})
    model, tokenizer = loaded(tmp_path / "run")
    references = load_examples(recipe.data, tokenizer, "prompts").eval
    scores = [score_alone(model, e.query_ids, e.completion_ids) for e in references]
    mean = sum(scores) / len(scores)
    assert mean == pytest.approx(0, abs=1e-4)
    assert math.sqrt(sum(s**2 for s in scores) / (len(scores) - 1)) == pytest.approx(1, abs=1e-4)
    assert model.config.scale != 1


def test_references_that_all_score_alike_have_no_unit(tmp_path):
    data = tmp_path / "references.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": "post", "completion": " same"}) for _ in range(2)))
    references = {"task": "own", "path": str(data), "eval_fraction": 0.0}
    with pytest.raises(ConfigError, match="score.unit_variance: all 1 references have the same score"):
        run_reward_model(tmp_path / "run", references=references, score={"unit_variance": True}, num_steps=1)
    with pytest.raises(
        ConfigError, match="score.unit_variance needs references: set score.num_references to 2"
    ):
        run_reward_model(tmp_path / "two", score={"unit_variance": True, "num_references": 1})


def test_an_adapter_is_trained_with_a_whole_head_and_saved_folded_in(tmp_path):
    policy = tmp_path / "policy"
    save_tiny_policy(policy)
    lora = {"path": str(policy), "lora": {"r": 2, "alpha": 4.0}}
    recipe, rows = run_reward_model(tmp_path / "run", policy, model=lora, optim={"learning_rate": 0.02})
    model, tokenizer = loaded(tmp_path / "run")
    held_out = load_examples(recipe.data, tokenizer, "pairs").eval
    pairs = [
        [score_alone(model, pair.query_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        for pair in held_out
    ]
    assert rows[-1]["eval/loss"] == pytest.approx(sum(log_loss(*p) for p in pairs) / len(pairs), rel=1e-4)
    weights = load_file(tmp_path / "run" / "reward_model" / "model.safetensors")
    base = load_file(policy / "model.safetensors")
    name = "layers.0.attention.query_key_value"
    assert weights["head.weight"].dtype == torch.float32 and not any("lora" in key for key in weights)
    assert not torch.equal(weights[f"backbone.{name}.weight"], base[f"gpt_neox.{name}.weight"])
    assert torch.equal(weights[f"backbone.{name}.bias"], base[f"gpt_neox.{name}.bias"]), "frozen"
    fresh = RewardModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(policy), recipe.seed)
    assert not torch.equal(weights["head.weight"], fresh.head.weight)


def ranked_data(folder: Path) -> dict:
    """Nine prompts with four responses, the longer the better."""
    rows = [
        {
            "prompt": f"post {i}",
            "responses": [" x" * k + f" {i}" for k in (2, 5, 1, 3)],
            "scores": [2, 5, 1, 3],
        }
        for i in range(18)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"task": "own", "path": str(folder / "ranked.jsonl"), "eval_fraction": 0.2}


@pytest.mark.parametrize(
    "loss",
    [{"by": "prompt"}, {"name": "plackett_luce"}, {"by": "prompt", "margin_scale": 0.1, "lm_coef": 0.1}],
)
def test_rankings_of_a_prompt_are_learnt_from_one_example(tmp_path, loss, capsys):
    policy = tmp_path / "policy"
    save_tiny_policy(policy)
    changes = {
        "data": ranked_data(tmp_path / "data"),
        "model": {"path": str(policy)},
        "loss": loss,
        "num_steps": 25,
    }
    _, rows = run_offline(RewardModelRecipe, train, tmp_path / "run", {**RECIPE, **changes})
    assert rows[0]["train/num_targets"] == 8, "prompts"
    assert rows[-1]["train/accuracy"] > 0.9 > rows[0]["train/accuracy"]
    assert ("one example for each of" in capsys.readouterr().out) == (loss.get("name") is None)


def test_settings_that_a_loss_does_not_have_are_refused(tmp_path):
    for changes, message in (
        ({"name": "plackett_luce", "by": "prompt"}, "loss.by does not apply to loss.name=plackett_luce"),
        ({"name": "plackett_luce", "label_smoothing": 0.1}, "loss.label_smoothing does not apply"),
        ({"label_smoothing": 0.5}, "loss.label_smoothing must be >= 0 and < 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_reward_model(tmp_path / "run", loss=changes)
    with pytest.raises(ConfigError, match="score.num_centring is now score.num_references"):
        run_reward_model(tmp_path / "run", score={"num_centring": 5})
