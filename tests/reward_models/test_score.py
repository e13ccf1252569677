"""A reward model as a RewardFn: on the policy's ids, or on text where the tokenizers differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from online_runs import forget_precision
from reward_model_folders import save_reward_model, score_alone
from tiny_models import ARCHITECTURES, tiny_model
from tiny_tokenizers import byte_level, single_bytes
from transformers import AutoConfig, AutoModelForSequenceClassification

from drpo.config import ConfigError
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.rewards import Completion
from reward_models.model import RewardModel
from reward_models.score import RewardModelScorer

PROMPT = "The sky is"
QUERIES = [[40, 41, 42], [50] * 9, [60, 61], [70, 71, 72, 73, 74], [80]]
RESPONSES = [[90, 91, 92, 0], [100, 0], [110, 111, 112], [120, 0], [130, 131, 132, 133, 134, 0]]


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    yield Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    forget_precision()


@pytest.fixture(scope="module")
def policy_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    single_bytes().save_pretrained(folder)
    return folder


def completion(query_ids, response_ids, prompt=PROMPT, response=" blue", ended=True) -> Completion:
    return Completion(prompt, response, ended, list(query_ids), list(response_ids), Record(prompt))


def completions() -> list[Completion]:
    """Their texts say nothing of their ids, so a score tells which of the two was read."""
    rows = zip(QUERIES, RESPONSES, strict=True)
    return [completion(query, response, ended=response[-1] == 0) for query, response in rows]


@pytest.mark.parametrize("aggregation", ["last", "sum"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_with_a_shared_tokenizer_the_ids_are_scored_in_their_order(
    tmp_path, engine, policy_tokenizer, batch_size, aggregation
):
    model = save_reward_model(tmp_path / "rm", single_bytes(), aggregation)
    scorer = RewardModelScorer.load(
        str(tmp_path / "rm"), engine, batch_size, "float32", str(policy_tokenizer)
    )
    scores = scorer(completions())
    expected = [
        score_alone(model, query, response) for query, response in zip(QUERIES, RESPONSES, strict=True)
    ]
    assert scores.shape == (5,) and scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=2e-5)
    assert len({round(score, 3) for score in expected}) == 5
    assert scorer(completions()[::-1]).tolist() == pytest.approx(expected[::-1], abs=2e-5)


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_responses_to_one_prompt_have_the_scores_that_they_have_alone(
    tmp_path, engine, policy_tokenizer, aggregation, monkeypatch
):
    model = save_reward_model(tmp_path / "rm", single_bytes(), aggregation)
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 4, "float32", str(policy_tokenizer))
    query = [*range(65, 85)]
    pairs = [(query, [70, 71, 0]), (QUERIES[0], [72, 0]), (query, [73, 74]), (query, [0])]
    batches = []
    score = RewardModel.score

    def noted(model, batch, num_continuations):
        batches.append((len(batch.responses), num_continuations))
        return score(model, batch, num_continuations)

    monkeypatch.setattr(RewardModel, "score", noted)
    found = scorer([completion(query, response, ended=response[-1] == 0) for query, response in pairs])
    assert batches == [(1, 1), (3, 3)]
    assert found.tolist() == pytest.approx([score_alone(model, *pair) for pair in pairs], abs=2e-5)


def test_with_another_tokenizer_the_text_is_scored(tmp_path, engine, policy_tokenizer):
    """The ids of a policy mean other tokens to this reward model, so they must not be read."""
    tokenizer = byte_level(vocab_size=300, bos=True)
    model = save_reward_model(tmp_path / "rm", tokenizer)
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 2, "float32", str(policy_tokenizer))
    texts = [(PROMPT, " blue", True), (PROMPT, " blue", False), ("I can", " help you with that", True)]
    scores = scorer([completion([5], [6], prompt, response, end) for prompt, response, end in texts])

    bos, stop = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = []
    for prompt, response, end in texts:
        query = [bos, *tokenizer(prompt, add_special_tokens=False).input_ids]
        ids = tokenizer(response, add_special_tokens=False).input_ids
        expected.append(score_alone(model, query, [*ids, stop] if end else ids))
    assert scores.tolist() == pytest.approx(expected, abs=2e-5)
    assert abs(expected[0] - expected[1]) > 1e-2  # a missing stop is seen


def test_without_a_stop_the_last_token_is_an_ordinary_one(tmp_path, engine, policy_tokenizer):
    model = save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 8, "float32", str(policy_tokenizer))
    cut = completion([40, 41], [90, 91, 92], ended=False)
    assert scorer([cut]).tolist() == pytest.approx([score_alone(model, [40, 41], [90, 91, 92])], abs=2e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_hugging_face_sequence_classifier_gives_its_own_logit(
    tmp_path, engine, policy_tokenizer, model_type
):
    tokenizer = single_bytes()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
        **ARCHITECTURES[model_type],
    )
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 2, "float32", str(policy_tokenizer))
    with torch.no_grad():
        expected = [
            classifier(torch.tensor([query + response])).logits.item()
            for query, response in zip(QUERIES, RESPONSES, strict=True)
        ]
    assert scorer(completions()).tolist() == pytest.approx(expected, abs=2e-5)


def test_the_precision_of_the_weights_is_the_one_asked_for(tmp_path, engine, policy_tokenizer):
    save_reward_model(tmp_path / "rm", single_bytes())
    exact, rounded = (
        RewardModelScorer.load(str(tmp_path / "rm"), engine, 8, dtype, str(policy_tokenizer))(completions())
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, atol=0.3, rtol=0.1)


def test_scores_carry_no_gradient(tmp_path, engine, policy_tokenizer):
    save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 8, "float32", str(policy_tokenizer))
    assert not scorer(completions()).requires_grad


def test_a_causal_language_model_is_no_reward_model(tmp_path, engine, policy_tokenizer):
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="LlamaForCausalLM: neither a scalar model"):
        RewardModelScorer.load(str(tmp_path / "lm"), engine, 8, "float32", str(policy_tokenizer))


def test_whatever_stopped_a_response_the_model_sees_its_own_stop_token(tmp_path, engine, policy_tokenizer):
    save_reward_model(tmp_path / "rm", single_bytes())
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 2, "float32", str(policy_tokenizer))
    eos = single_bytes().eos_token_id
    by_newline, by_eos = completion([40, 41], [90, 10]), completion([40, 41], [90, eos])
    assert scorer([by_newline]).tolist() == scorer([by_eos]).tolist()
    unended = completion([40, 41], [90, 10], ended=False)
    assert scorer([unended]).tolist() != scorer([by_eos]).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_whose_scores_depend_on_the_batch_is_refused_in_any_precision(dtype, engine, tmp_path):
    """Padding enters its state; half precision, which loading does not probe on a CPU, is probed where it scores."""
    tokenizer = single_bytes()
    for name in ("rwkv", "llama"):
        model = RewardModel.from_causal_lm(tiny_model(name, vocab_size=len(tokenizer)))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    RewardModelScorer.load(str(tmp_path / "llama"), engine, 2, dtype, None)
    with pytest.raises(ConfigError, match="reward.path: RwkvModel .*scores would depend on the batch"):
        RewardModelScorer.load(str(tmp_path / "rwkv"), engine, 2, dtype, None)
