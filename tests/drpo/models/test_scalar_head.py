from __future__ import annotations

import math

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from drpo.models.adapters import add_lora
from drpo.models.export import save_policy
from drpo.models.loading import ModelConfig, load_scalar_model
from drpo.models.scalar_head import ScalarModel, ScalarModelConfig, token_hidden, token_values
from drpo.models.tokenizer import train_tokenizer
from drpo.tensors import pad_batch

PAD = 2
QUERIES = [[3, 4, 5], [7] * 11, [9, 8, 7, 6, 5, 4, 3], [10]]
RESPONSES = [[11, 12, 1], [13], [14, 15, 16, 17, 1], [20, 21, 22, 23]]


def batch(**lengths):
    return pad_batch(QUERIES, RESPONSES, PAD, **lengths)


class MarginConfig(ScalarModelConfig):
    model_type = "margin_for_tests"

    def __init__(self, margin: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.margin = margin


class MarginModel(ScalarModel):
    config_class = MarginConfig


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_values_are_the_head_on_the_hidden_states_of_each_row_alone(model_type):
    causal_lm = tiny_model(model_type)
    model = ScalarModel.from_causal_lm(causal_lm, seed=3)
    with torch.no_grad():
        model.head.bias.fill_(0.25)
        values = token_values(model, batch(query_length=13, response_length=7))
        scores = model.head(token_hidden(model, batch(query_length=13, response_length=7))[:, 1:])
        for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
            hidden = causal_lm.base_model(torch.tensor([query + response])).last_hidden_state[0]
            outputs = [float((h * model.head.weight[0]).sum()) + 0.25 for h in hidden]
            first, last = len(query), len(query) + len(response)
            assert values[row, : len(response)].tolist() == pytest.approx(
                outputs[first - 1 : last - 1], abs=1e-5
            )
            assert scores[row, : len(response)].tolist() == pytest.approx(outputs[first:last], abs=1e-5)
    assert values.shape == scores.shape == (4, 7)


def test_a_fresh_head_has_variance_one_over_h_plus_one_and_follows_the_seed():
    causal_lm = tiny_model("llama", hidden_size=512)
    heads = [ScalarModel.from_causal_lm(causal_lm, seed).head for seed in range(20)]
    weights = torch.cat([head.weight for head in heads])
    assert weights.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.03)
    assert all(head.bias.item() == 0 for head in heads)
    assert torch.equal(heads[4].weight, ScalarModel.from_causal_lm(causal_lm, 4).head.weight)
    assert not torch.equal(heads[4].weight, heads[5].weight)


def test_from_causal_lm_shares_nothing_and_draws_nothing_from_the_global_generator():
    causal_lm = tiny_model("gpt_neox")
    before = {name: p.clone() for name, p in causal_lm.named_parameters()}
    state = torch.get_rng_state()
    model = ScalarModel.from_causal_lm(causal_lm)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in causal_lm.named_parameters())


def test_from_causal_lm_keeps_checkpointing_attention_and_mode():
    causal_lm = tiny_model("llama")
    causal_lm.gradient_checkpointing_enable()
    causal_lm.set_attn_implementation("eager")
    model = ScalarModel.from_causal_lm(causal_lm.train())
    assert model.is_gradient_checkpointing and model.training
    assert model.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_save_and_load_are_exact(model_type, tmp_path):
    model = ScalarModel.from_causal_lm(tiny_model(model_type), seed=1)
    with torch.no_grad():
        model.head.bias.fill_(-0.5)
    model.save_pretrained(tmp_path)
    for loaded in (ScalarModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is ScalarModel
        with torch.no_grad():
            assert torch.equal(token_values(loaded, batch()), token_values(model, batch()))
    assert AutoConfig.from_pretrained(tmp_path).backbone["model_type"] == model_type


def test_a_subclass_keeps_its_config_keys(tmp_path):
    model = MarginModel.from_causal_lm(tiny_model("gpt_neox"))
    assert type(model) is MarginModel
    model.config.margin = 1.5
    model.config.note = "an extra key"
    model.save_pretrained(tmp_path)
    loaded = MarginModel.from_pretrained(tmp_path)
    assert (loaded.config.margin, loaded.config.note) == (1.5, "an extra key")
    assert type(load_scalar_model(tmp_path, ModelConfig(), MarginModel)) is MarginModel
    plain = load_scalar_model(tmp_path, ModelConfig())  # its type is in no registry
    assert type(plain) is ScalarModel and plain.training
    assert torch.equal(token_values(plain, batch()), token_values(model, batch()))
    plain.save_pretrained(tmp_path / "again")
    assert ScalarModel.from_pretrained(tmp_path / "again").config.note == "an extra key"


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2", "opt"])
def test_loads_a_sequence_classifier_with_one_label(model_type, tmp_path):
    config = AutoConfig.for_model(
        model_type, vocab_size=61, pad_token_id=PAD, num_labels=1, **ARCHITECTURES[model_type]
    )
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    model = load_scalar_model(tmp_path, ModelConfig())
    scores = model.head(token_hidden(model, batch())[:, 1:])
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        # The classifier itself reads out the last token of a row.
        expected = classifier(torch.tensor([query + response])).logits.item()
        assert scores[row, len(response) - 1].item() == pytest.approx(expected, abs=1e-5)


def test_two_labels_are_refused(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=61, num_labels=2, **ARCHITECTURES["llama"])
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 labels"):
        load_scalar_model(tmp_path, ModelConfig())


def test_a_language_model_is_no_scalar_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM: neither a scalar model"):
        load_scalar_model(tmp_path, ModelConfig())
    with pytest.raises(ValueError, match="no folder .*it holds|no folder"):
        load_scalar_model(tmp_path / "nothing", ModelConfig())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_applies_to_the_backbone_and_head_and_outputs_stay_float32(dtype, tmp_path):
    ScalarModel.from_causal_lm(tiny_model("llama")).save_pretrained(tmp_path)
    model = load_scalar_model(tmp_path, ModelConfig(dtype=dtype))
    assert {p.dtype for p in model.backbone.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert token_values(model, batch()).dtype == torch.float32


def test_the_head_is_computed_in_float32_under_autocast():
    model = ScalarModel.from_causal_lm(tiny_model("llama"))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(3.14159)
        with torch.autocast("cpu", torch.bfloat16):
            values = token_values(model, batch())
    assert torch.equal(values, torch.full_like(values, 3.14159))


def test_attention_implementation_reaches_the_backbone(tmp_path):
    ScalarModel.from_causal_lm(tiny_model("llama")).save_pretrained(tmp_path)
    model = load_scalar_model(tmp_path, ModelConfig(attn_implementation="eager"))
    assert model.backbone.config._attn_implementation == "eager"


def test_positions_and_mask_may_be_left_out():
    model = ScalarModel.from_causal_lm(tiny_model("gpt2"))
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones_like(ids)
    assert torch.equal(model(ids), model(ids, mask, torch.arange(4)[None]))
    assert not torch.equal(model(ids), model(ids, mask, torch.tensor([[0, 2, 4, 6]])))


def test_hidden_size_is_that_of_the_output():
    assert ScalarModel.from_causal_lm(tiny_model("opt")).config.hidden_size == 16
    assert ScalarModel.from_causal_lm(tiny_model("gpt2")).config.hidden_size == 32
    with pytest.raises(ValueError, match="backbone"):
        ScalarModelConfig().backbone_config()


def test_a_head_is_float32_in_the_folder_too_over_a_bfloat16_backbone(tmp_path):
    model = ScalarModel.from_causal_lm(tiny_model("llama").bfloat16(), seed=3)
    assert model.dtype == torch.bfloat16 and not torch.equal(model.head.weight.bfloat16(), model.head.weight)
    tokenizer = train_tokenizer(["a text"], 300)
    save_policy(model, tokenizer, tmp_path / "critic", "")
    for dtype in ("auto", "bfloat16", "float32"):
        loaded = load_scalar_model(tmp_path / "critic", ModelConfig(dtype=dtype))
        assert (
            torch.equal(loaded.head.weight, model.head.weight) and loaded.head.weight.dtype == torch.float32
        )
        assert loaded.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert AutoTokenizer.from_pretrained(tmp_path / "critic").padding_side == "left"


def dtypes_of(model):
    return {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("model_type", ["gpt_neox", "gemma2", "falcon_h1", "llama with LoRA"])
def test_weights_and_buffers_have_the_precision_that_transformers_loads_them_in(model_type, tmp_path):
    """Gemma's embedding scale and Falcon-H1's multipliers become bfloat16, rotary frequencies do not."""
    model_type, _, lora = model_type.partition(" ")
    tiny_model(model_type).save_pretrained(tmp_path)
    causal_lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dtypes_of(causal_lm.base_model)
    assert {torch.bfloat16, torch.float32} == set(expected.values())
    if lora:
        causal_lm = add_lora(causal_lm, r=2, alpha=4, target_modules=None, seed=0)
    model = ScalarModel.from_causal_lm(causal_lm)
    assert dtypes_of(model.backbone) == expected
    assert model.head.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "scalar")
    again = load_scalar_model(tmp_path / "scalar", ModelConfig(dtype="bfloat16"))
    assert dtypes_of(again.backbone) == expected


@pytest.mark.parametrize("source", ["causal LM", "sequence classifier"])
def test_long_rows_in_bfloat16_are_float32_to_rounding(source, tmp_path):
    """Against the formula in float32 with the same rounded weights. Frequencies in bfloat16 are 0.4% off, which turns
    the fastest pairs by a radian and more after some hundred tokens."""
    tokens = torch.randint(3, 60, (8, 700), generator=torch.Generator().manual_seed(0))
    rows = pad_batch(tokens.tolist(), [[5, 6, 7, 8, 9]] * 8, PAD)
    causal_lm = tiny_model("llama", max_position_embeddings=1024, head_dim=32)
    with torch.no_grad():
        for weight in causal_lm.parameters():
            weight.copy_(weight.bfloat16())
    if source == "causal LM":
        causal_lm.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        model = ScalarModel.from_causal_lm(half)
    else:
        classifier = AutoModelForSequenceClassification.from_config(
            LlamaConfig.from_dict({**causal_lm.config.to_dict(), "id2label": {0: "score"}})
        )
        classifier.model.load_state_dict(causal_lm.model.state_dict())
        classifier.save_pretrained(tmp_path)
        model = load_scalar_model(tmp_path, ModelConfig(dtype="bfloat16"))
    with torch.no_grad():
        hidden = causal_lm.model(rows.query_responses).last_hidden_state
        expected = (hidden @ model.head.weight[0] + model.head.bias)[:, -5:]
        error = model.head(token_hidden(model, rows)[:, 1:]) - expected
    assert error.pow(2).mean().sqrt() < 0.04 * expected.std()
