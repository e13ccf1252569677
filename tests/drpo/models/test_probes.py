from __future__ import annotations

import pytest
import torch
from sampled import generate
from tiny_models import ARCHITECTURES, HYBRIDS, MORE, REFUSED, VOCAB_SIZE, tiny_model

from drpo.config import ConfigError
from drpo.models.loading import ModelConfig, load_policy, load_scalar_model
from drpo.models.probes import can_probe_now, check_policy, check_scalar_model
from drpo.models.scalar_head import ScalarModel, token_values
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import train_tokenizer
from drpo.models.trunk import freeze_trunk
from drpo.rollout.sampler import SamplingConfig, draw_uniforms, sample_tokens
from drpo.tensors import pad_batch

CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24], [12, 13, 14]]


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *MORE, *HYBRIDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_whose_padded_rows_and_cached_steps_are_exact_pass(model_type, dtype):
    check_policy(tiny_model(model_type).to(dtype))
    check_scalar_model(ScalarModel.from_causal_lm(tiny_model(model_type).to(dtype)), "critic.path")


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_with_a_state_of_their_own_are_refused_wherever_they_come_in(model_type, tmp_path):
    model = tiny_model(model_type, vocab_size=300)
    tokenizer = train_tokenizer(["a text"], 300)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model.path: .*(key-value cache|left-padded)"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)
    scratch = {"model_type": model_type, **REFUSED[model_type]}
    with pytest.raises(ConfigError, match="model.architecture.model_type: .*(key-value cache|left-padded)"):
        load_policy(ModelConfig(architecture=scratch, vocab_size=300), tokenizer)
    with pytest.raises(ConfigError, match=type(model).__name__):
        uniforms = draw_uniforms(0, [0], 2)
        generate(model, [[3, 4]], [2], uniforms, sampling=SamplingConfig(), stop_ids=[1], batch_size=1)
    with pytest.raises(ConfigError, match=type(model).__name__):
        response_logprobs(model, pad_batch([[3, 4]], [[5]], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scalar_model_that_reads_its_padding_is_refused(dtype, tmp_path):
    model = ScalarModel.from_causal_lm(tiny_model("llama")).to(dtype)
    forward = model.backbone.forward
    model.backbone.forward = lambda attention_mask=None, position_ids=None, **kw: forward(**kw)
    with pytest.raises(ConfigError, match="critic.path: LlamaModel gives a left-padded row other outputs"):
        check_scalar_model(model, "critic.path")
    ScalarModel.from_causal_lm(tiny_model("rwkv")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="reward.path: RwkvModel"):
        load_scalar_model(tmp_path, ModelConfig(), key="reward.path")


def test_a_head_of_zeros_does_not_hide_what_the_backbone_reads():
    """As that of a fresh critic."""
    critic = ScalarModel.from_causal_lm(tiny_model("rwkv"))
    torch.nn.init.zeros_(critic.head.weight)
    with pytest.raises(ConfigError, match="RwkvModel gives a left-padded row other outputs"):
        check_scalar_model(critic)


def test_a_half_precision_critic_is_probed_at_its_first_values_also_upon_a_trunk(tmp_path):
    """On a CPU half precision is not probed when it is loaded, since that may take minutes."""
    ScalarModel.from_causal_lm(tiny_model("llama")).save_pretrained(tmp_path)
    batch = pad_batch([[3, 4, 5], [6]], [[7, 8], [9]], 0)
    for on_trunk in (False, True):
        critic = load_scalar_model(tmp_path, ModelConfig(dtype="bfloat16"), key="critic.path")
        forward = critic.backbone.forward
        critic.backbone.forward = lambda attention_mask=None, position_ids=None, forward=forward, **kw: (
            forward(**kw)
        )
        with pytest.raises(ConfigError, match="LlamaModel gives a left-padded row other outputs"):
            if on_trunk:
                freeze_trunk(critic, 1)
            else:
                token_values(critic, batch)


def test_the_probe_leaves_no_trace():
    model = tiny_model("qwen3_moe").train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    check_policy(model)
    assert model.training and not model.lm_head.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_not_finite_are_not_taken_for_another_kind_of_model():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    check_policy(model)


def test_half_precision_on_a_cpu_waits_for_its_first_use():
    assert can_probe_now(tiny_model("llama"))
    assert not can_probe_now(tiny_model("llama").bfloat16())


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_recurrent_states_follow_their_rows_when_others_end(model_type):
    """Equal contexts are computed once, and rows leave the batch: both select rows of the cache."""
    model, stops = tiny_model(model_type), [1, *range(30, VOCAB_SIZE)]
    uniforms = draw_uniforms(1, range(len(CONTEXTS)), 8)
    expected = []
    for context, numbers in zip(CONTEXTS, uniforms, strict=True):
        new = []
        while len(new) < 8 and not set(new) & set(stops):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + new]), use_cache=False).logits[:, -1]
            new.append(sample_tokens(logits, numbers[None, len(new)], SamplingConfig())[0].item())
        expected.append(new)
    assert len({len(new) for new in expected}) > 2, "rows end at different steps"
    got = generate(
        model, CONTEXTS, [8] * 4, uniforms, sampling=SamplingConfig(), stop_ids=stops, batch_size=4
    )
    assert got == expected
