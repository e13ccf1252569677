"""What docs/models.md says of each family, on tiny random models of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sampled import generate
from tiny_models import ARCHITECTURES, HYBRIDS, MORE, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.models.export import save_policy
from drpo.models.loading import LoraConfig, ModelConfig, load_policy
from drpo.models.positions import position_limit
from drpo.models.scoring import head_is_plain, response_logprobs
from drpo.models.shared_prompt import can_share_prompt
from drpo.models.tokenizer import load_tokenizer, train_tokenizer
from drpo.rollout.sampler import SamplingConfig, draw_uniforms
from drpo.tensors import masked_sum, pad_batch

DOCS = Path(__file__).parents[3] / "docs" / "models.md"
FAMILIES = [*ARCHITECTURES, *MORE, *HYBRIDS]
ADAPTED_BY_HAND = {
    "falcon_h1": ["q_proj", "v_proj"]
}  # PEFT refuses the output projections of its Mamba layers
PROMPTS = ["a post about cats", "dogs"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a post about cats and dogs", "TL;DR: cats"] * 20, 300)


def saved(model_type, tokenizer, folder):
    tiny_model(model_type, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def table() -> dict[str, dict[str, str]]:
    """model_type -> column -> cell of the table of families in docs/models.md."""
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(rows) if line.startswith("| family |"))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[start:]]
    names = cells[0]
    result = {}
    for row in cells[2:]:
        if len(row) != len(names):
            break
        for model_type in row[1].split(", "):
            result[model_type.strip("`")] = dict(zip(names, row, strict=True))
    return result


def test_the_table_has_every_family_that_is_tested_and_no_other():
    assert set(table()) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_heads_shared_prompts_and_positions_are_as_the_table_says(model_type):
    model, row = tiny_model(model_type), table()[model_type]
    assert row["head"] == ("chunked" if head_is_plain(model) else "whole")
    assert row["shared prompts"] == ("yes" if can_share_prompt(model) else "no")
    limit = position_limit(model)
    assert row["positions"] == {"bloom": "ALiBi"}.get(model_type, "rotary" if limit is None else "table")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora_trains_and_the_written_folder_is_the_trained_model(model_type, tokenizer, tmp_path):
    path = saved(model_type, tokenizer, tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=ADAPTED_BY_HAND.get(model_type))
    policy = load_policy(ModelConfig(path=path, lora=lora), tokenizer)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    batch = pad_batch([[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14]], tokenizer.pad_token_id)
    for _ in range(2):  # B is 0 at first, so A has a gradient from the second step on
        logprobs = response_logprobs(policy, batch).logprobs
        masked_sum(-logprobs, batch.response_mask).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, base = (
            policy.eval()(ids).logits,
            tiny_model(model_type, vocab_size=len(tokenizer))(ids).logits,
        )
        save_policy(policy, tokenizer, tmp_path / "policy", "")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-3, rtol=1e-3)
    assert (expected - base).abs().max() > 0.01, "it learnt something"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plain_transformers_decodes_a_written_folder_in_a_padded_batch_as_we_do(
    model_type, tokenizer, tmp_path
):
    """With a tokenizer that pads with its stop token, so that ours gets a "[PAD]" without an embedding."""
    path = saved(model_type, tokenizer, tmp_path / "base")
    for file in (tmp_path / "base" / "tokenizer.json", tmp_path / "base" / "tokenizer_config.json"):
        file.write_text(
            file.read_text().replace('"pad_token": "[PAD]"', '"pad_token": null').replace("[PAD]", "<x>")
        )
    num_tokens = len(tokenizer)
    ours = load_tokenizer(path)
    policy = load_policy(ModelConfig(path=path), ours).eval()
    save_policy(policy, ours, tmp_path / "policy", "")
    assert (ours.pad_token, ours.pad_token_id) == ("[PAD]", num_tokens), "the one in use is left as it was"

    plain = AutoTokenizer.from_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    embedded = model.get_input_embeddings().weight.shape[0]
    assert len(plain) == embedded == num_tokens and "[PAD]" not in plain.get_vocab()
    assert model.config.pad_token_id == model.generation_config.pad_token_id == plain.pad_token_id < embedded
    batch = plain(PROMPTS, padding=True, return_tensors="pt")
    assert batch.attention_mask[0].all() and not batch.attention_mask[1, 0], "padded on the left"
    new = model.generate(**batch, do_sample=False, max_new_tokens=6)[:, batch.input_ids.shape[1] :].tolist()
    contexts = [plain(prompt).input_ids for prompt in PROMPTS]
    eos = model.generation_config.eos_token_id
    stop_ids = eos if isinstance(eos, list) else [eos]
    options = {"sampling": SamplingConfig(temperature=0), "stop_ids": stop_ids, "batch_size": 2}
    expected = generate(policy, contexts, [6, 6], draw_uniforms(0, [0, 1], 6), **options)
    assert [row[: len(own)] for row, own in zip(new, expected, strict=True)] == expected
    assert load_tokenizer(tmp_path / "policy").get_vocab() == ours.get_vocab(), (
        "and comes back here as it was"
    )


def test_sampling_flags_that_transformers_would_not_write_back_do_not_end_a_run(tokenizer, tmp_path):
    """Llama 2 Chat names a temperature and no do_sample, which can be read and not be saved."""
    path = saved("llama", tokenizer, tmp_path / "base")
    flags = {"temperature": 0.6, "top_p": 0.9}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(flags))
    policy = load_policy(ModelConfig(path=path), tokenizer)
    with pytest.raises(ValueError, match="do_sample"):
        policy.save_pretrained(tmp_path / "refused")
    save_policy(policy, tokenizer, tmp_path / "policy", "")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").generation_config
    assert (written.do_sample, written.temperature, written.top_p) == (True, 0.6, 0.9)


def test_a_tokenizer_without_a_limit_takes_the_positions_of_the_model(tokenizer, tmp_path):
    policy = load_policy(ModelConfig(path=saved("gpt2", tokenizer, tmp_path / "base")), tokenizer)
    save_policy(policy, tokenizer, tmp_path / "policy", "")
    plain = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert plain.model_max_length == 64 and tokenizer.model_max_length > 64
    assert len(plain("cats " * 100, truncation=True).input_ids) == 64
