"""Numbers of single responses against loops over tokens, a hand-made pair of policies, and exact KLs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from eval.completions.response_scores import response_kls, response_nlls, reward_scores
from eval.completions.rows import CompletionRow, prompt_id_of
from eval.completions.text_metrics import measure

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "rotary_dim": 8,
}


def row(response, prompt="p", ended=True, seed=0, reference=None, meta=None):
    return CompletionRow(
        "sft", prompt_id_of(prompt), prompt, response, ended, None, seed, reference, meta or {}
    )


ROWS = [
    row(" rope soap tent", "POST: we need rope soap tent\nTL;DR:", seed=0),
    row(" rope", "POST: we need rope soap tent\nTL;DR:", ended=False, seed=1),
    row("", "POST: a very much longer post, for padding on the left of the others\nTL;DR:"),
    row("", "POST: nothing\nTL;DR:", ended=False),
]


@pytest.fixture(scope="module")
def policy(policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    return AutoModelForCausalLM.from_pretrained(policy_folder).eval(), tokenizer


@torch.no_grad()
def test_nlls_are_those_of_a_loop_over_tokens(policy):
    model, tokenizer = policy
    expected, counts = [], []
    for each in ROWS:
        ids = tokenizer(each.prompt).input_ids
        response = tokenizer(each.response).input_ids + [tokenizer.eos_token_id] * each.ended
        nll = 0.0
        for token in response:
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            nll -= float(logits[token] - logits.exp().sum().log())
            ids = [*ids, token]
        expected.append(nll)
        counts.append(len(response))
    assert counts[2:] == [1, 0]
    for batch_size in (1, 3, 8):
        nlls, num_tokens = response_nlls(model, tokenizer, ROWS, batch_size)
        assert num_tokens.tolist() == counts
        assert nlls == pytest.approx(expected, abs=1e-4)


def test_a_policy_that_knows_nothing_has_the_size_of_its_vocabulary(policy_folder, policy):
    _, tokenizer = policy
    model = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    model.get_output_embeddings().weight.data.zero_()
    nlls, counts = response_nlls(model, tokenizer, ROWS, 2)
    metrics = measure(ROWS, (nlls, counts))
    assert metrics.perplexity.value == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert metrics.perplexity.num_prompts == 2  # the response of no tokens says nothing


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_a_table_of_positions_ends_and_rotary_positions_go_on_with_a_warning(policy, model_type):
    _, tokenizer = policy
    sizes = {**TINY, "n_positions": 64} if model_type != "llama" else {**TINY, "max_position_embeddings": 64}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [row("a", "p"), row("a " * 100, "q")]
    tokens = len(tokenizer("q" + "a " * 100).input_ids) + 1
    said = f"1 of 2 texts are longer than the 64 positions of this {model_type} model, the longest has {tokens} tokens"
    if model_type == "llama":
        lines = []
        response_nlls(model, tokenizer, rows, 2, say=lines.append)
        assert lines == [f"warning: perplexity_policy: {said}; choose another model, or cut the prompts"]
        return
    with pytest.raises(ConfigError, match=f"perplexity_policy: {said}; choose another model"):
        response_nlls(model, tokenizer, rows, 2)
    longer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**sizes, "n_positions": 512})
    ).eval()
    with pytest.raises(ConfigError, match=f"kl_reference: {said}"):
        response_kls(longer, model, tokenizer, rows, 2)


# --- KL --------------------------------------------------------------------------------------------------


def with_bias(policy_folder, bias):
    """The policy with `bias` on the logit of the stop token: its head is a sum with a constant."""
    model = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[0] = bias
    model.set_output_embeddings(head)
    return model


def test_the_kl_of_a_policy_to_itself_is_nothing(policy):
    model, tokenizer = policy
    assert response_kls(model, model, tokenizer, ROWS, 2).tolist() == [0.0] * len(ROWS)


def test_a_log_ratio_by_hand(policy_folder, policy):
    """Uniform over V tokens against one whose token 0 weighs e^2: each token has its own constant log-ratio."""
    model, tokenizer = policy
    size = model.config.vocab_size
    uniform, tilted = with_bias(policy_folder, 0.0), with_bias(policy_folder, 2.0)
    log_sum = math.log(size - 1 + math.e**2)
    on_zero, elsewhere = 2 - log_sum + math.log(size), math.log(size) - log_sum
    rows = [
        row("", meta={"response_ids": [5, 0, 0]}),
        row("", meta={"response_ids": [7]}),
        row("", ended=False),
    ]
    kls = response_kls(tilted, uniform, tokenizer, rows, 8)
    assert kls == pytest.approx([2 * on_zero + elsewhere, elsewhere, 0.0], abs=1e-5)


def test_what_is_never_sampled_is_in_no_policy(policy_folder, policy):
    """Token 0 takes e^2 of the weight of one policy alone; where neither can say it, both are uniform over V - 1."""
    _, tokenizer = policy
    uniform, tilted = with_bias(policy_folder, 0.0), with_bias(policy_folder, 2.0)
    rows = [row("", meta={"response_ids": [5, 7]})]
    assert response_kls(tilted, uniform, tokenizer, rows, 8, [0]).item() == pytest.approx(0, abs=1e-5)
    assert abs(response_kls(tilted, uniform, tokenizer, rows, 8).item()) > 0.01


def test_tokens_that_were_sampled_count_and_not_those_of_the_text(policy_folder, policy):
    _, tokenizer = policy
    uniform, tilted = with_bias(policy_folder, 0.0), with_bias(policy_folder, 2.0)
    text = " rope soap"
    ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
    kept = row(text, meta={"response_ids": ids})
    other = row(text, meta={"response_ids": [*ids[:-1], 0, 0, ids[-1]]})
    encoded, same, longer = response_kls(tilted, uniform, tokenizer, [row(text), kept, other], 1)
    assert encoded == pytest.approx(same, abs=1e-6) and longer != pytest.approx(same, abs=0.1)


def test_batches_change_no_kl(policy_folder, policy):
    model, tokenizer = policy
    reference = with_bias(policy_folder, 1.0)
    alone = response_kls(model, reference, tokenizer, ROWS, 1)
    assert response_kls(model, reference, tokenizer, ROWS, 8) == pytest.approx(alone, abs=1e-4)
    assert np.abs(alone[:3]).min() > 0.1 and alone[3] == 0


# --- rewards --------------------------------------------------------------------------------------------


def test_a_reward_function_sees_text_end_and_reference():
    seen = []

    def reward(completions):
        seen.extend((c.prompt, c.response, c.ended, c.record.completion) for c in completions)
        return torch.tensor([1.5, -2.0])

    rows = [row(" a", "p", reference=" gold"), row(" b", "q", ended=False)]
    assert reward_scores(reward, rows).tolist() == [1.5, -2.0]
    assert seen == [("p", " a", True, " gold"), ("q", " b", False, None)]


@pytest.mark.parametrize(
    "scores, message", [([1.0], "1 scores for 2"), ([1.0, math.nan], "1 scores that are not finite")]
)
def test_a_reward_function_that_fails_is_named(scores, message):
    with pytest.raises(ValueError, match=message):
        reward_scores(lambda _: scores, [row("a"), row("b", "q")])
