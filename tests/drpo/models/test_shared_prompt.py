from __future__ import annotations

import pytest
import torch
from logit_rows import logit_rows
from tiny_models import ARCHITECTURES, HYBRIDS, VOCAB_SIZE, tiny_model
from torch import nn

from drpo.models.adapters import add_lora
from drpo.models.scalar_head import ScalarModel, token_hidden, token_values
from drpo.models.scoring import adapter_disabled, head_is_plain, response_logprobs
from drpo.models.shared_prompt import (
    can_share_prompt,
    continuation_hidden,
    continuation_logprobs,
    continuation_values,
    narrowest_window,
    pack_rows,
)
from drpo.tensors import PaddedBatch, pad_batch

PAD = 2
QUERY_LENGTHS = (3, 12, 20, 1)
WIDE = {name: {"sliding_window": 256} for name in ("mistral", "gemma2")}
SHARING = [name for name in ARCHITECTURES if name != "bloom"]


def shared_batch(num_continuations: int, seed: int = 0, pad_id: int = PAD) -> PaddedBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()

    queries = [draw(length) for length in QUERY_LENGTHS]
    lengths = torch.randint(1, 10, (num_continuations * len(queries),), generator=generator).tolist()
    return pad_batch(queries * num_continuations, [draw(length) for length in lengths], pad_id)


def weighted_gradients(model, logprobs, batch) -> dict[str, torch.Tensor]:
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logprobs * weights)[batch.response_mask].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_separate_rows(model, batch, num_continuations, **options) -> None:
    """Values and gradients of the shared rows are those of `response_logprobs`."""
    expected = response_logprobs(model, batch).logprobs
    gradients = weighted_gradients(model, expected, batch)
    assert expected[batch.response_mask].std() > 0.1 and len(gradients) >= 8, "else this proves nothing"
    logprobs = continuation_logprobs(model, batch, num_continuations, **options).logprobs
    assert logprobs.shape == batch.responses.shape and logprobs.dtype == torch.float32
    assert torch.isfinite(logprobs).all()
    real = batch.response_mask
    torch.testing.assert_close(logprobs[real], expected[real], atol=2e-5, rtol=0)
    got = weighted_gradients(model, logprobs, batch)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.fixture
def rows_fed():
    """`rows_fed(model)` is a list that grows by the number of rows with every forward of the model."""
    handles = []

    def watch(model) -> list[int]:
        seen: list[int] = []
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda m, args, out: seen.append(len(args[0]))))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


# --- equal to separate rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SHARING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_continuations", [2, 4])
def test_shared_prompts_score_and_learn_as_separate_rows(
    model_type, implementation, num_continuations, rows_fed
):
    model = tiny_model(model_type, **WIDE.get(model_type, {}))
    model.set_attn_implementation(implementation)
    batch = shared_batch(num_continuations)
    assert can_share_prompt(model)
    head_is_plain(model)
    assert_equals_separate_rows(model, batch, num_continuations, chunk_size=17)
    seen = rows_fed(model)
    continuation_logprobs(model, batch, num_continuations)
    assert seen == [len(QUERY_LENGTHS)], "one forward, one row per query"


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gemma2"])
def test_temperature_suppressed_ids_and_entropy_apply_as_to_separate_rows(model_type):
    model, batch = tiny_model(model_type, **WIDE.get(model_type, {})).double(), shared_batch(3)
    options = {"temperature": 0.6, "suppressed_ids": (1, 5, 7), "entropy": True}
    expected, shared = (
        response_logprobs(model, batch, **options),
        continuation_logprobs(model, batch, 3, **options),
    )
    plain = response_logprobs(model, batch).logprobs
    real = batch.response_mask
    assert (expected.logprobs - plain)[real].abs().max() > 0.1, "else the options do nothing"
    for one, other in zip(expected, shared, strict=True):
        torch.testing.assert_close(one[real], other[real], atol=1e-5, rtol=0)  # float32 logits


@pytest.mark.parametrize("implementation, dtype", [("sdpa", torch.float64), ("eager", torch.float32)])
@pytest.mark.parametrize("lora", [False, True])
def test_values_and_their_gradients_are_those_of_separate_rows(implementation, dtype, lora, rows_fed):
    causal_lm = tiny_model("llama")
    causal_lm.set_attn_implementation(implementation)
    model = ScalarModel.from_causal_lm(causal_lm).to(dtype)
    if lora:
        model = add_lora(model, r=2, alpha=4.0, target_modules=None, seed=0, trained_whole=("head",))
    batch = shared_batch(4)
    expected = token_values(model, batch)
    gradients = weighted_gradients(model, expected, batch)
    assert expected[batch.response_mask].std() > 0.01 and gradients, "else this proves nothing"
    assert can_share_prompt(model)
    seen = rows_fed(model)
    values = continuation_values(model, batch, 4)
    assert seen == [len(QUERY_LENGTHS)], "one forward, one row per query"
    real = batch.response_mask
    torch.testing.assert_close(values[real], expected[real], atol=1e-5, rtol=0)  # the head is in float32
    assert not values[~real].any()
    shared = weighted_gradients(model, values, batch)
    assert shared.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", SHARING)
def test_hidden_states_around_response_tokens_are_those_of_separate_rows(model_type, rows_fed):
    """The last token's too, which predicts nothing, and of responses of one token."""
    model = ScalarModel.from_causal_lm(tiny_model(model_type, **WIDE.get(model_type, {})))
    batch = pad_batch([[3, 4], [5, 6, 7]] * 3, [[8], [9, 8], [10, 11, 12, 3], [11], [12], [13, 4]], PAD)
    expected = token_hidden(model, batch)
    assert can_share_prompt(model)
    seen = rows_fed(model)
    hidden = continuation_hidden(model, batch, 3)
    assert seen == [2], "one forward, one row per query"
    assert hidden.shape == expected.shape and hidden.shape[:2] == (6, 5)
    real = torch.cat([batch.response_mask[:, :1], batch.response_mask], dim=1)  # before the first token too
    torch.testing.assert_close(hidden[real], expected[real], atol=2e-5, rtol=1e-4)


def test_responses_of_one_token_are_packed_too():
    model = tiny_model("gpt_neox")
    batch = pad_batch([[3, 4], [5, 6, 7]] * 3, [[8], [9], [10], [11], [12], [13]], PAD)
    expected = response_logprobs(model, batch).logprobs
    torch.testing.assert_close(continuation_logprobs(model, batch, 3).logprobs, expected, atol=2e-5, rtol=0)


def test_one_response_is_an_ordinary_row(rows_fed):
    model, batch = tiny_model("llama"), shared_batch(1)
    head_is_plain(model)
    seen = rows_fed(model)
    assert torch.equal(
        continuation_logprobs(model, batch, 1).logprobs, response_logprobs(model, batch).logprobs
    )
    assert seen == [4, 4]


@pytest.mark.parametrize("model_type", ["gpt_neox", "gemma2"])
def test_gradient_checkpointing_changes_nothing(model_type):
    model = tiny_model(model_type, **WIDE.get(model_type, {}))
    batch = shared_batch(2)
    plain = weighted_gradients(model, continuation_logprobs(model, batch, 2).logprobs, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = weighted_gradients(model, continuation_logprobs(model, batch, 2, chunk_size=9).logprobs, batch)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_lora_and_its_reference_share_prompts_too(rows_fed):
    base = tiny_model("llama")
    batch = shared_batch(2)
    with torch.no_grad():
        expected_reference = response_logprobs(base, batch).logprobs
    model = add_lora(base, r=2, alpha=4.0, target_modules=None, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    assert_equals_separate_rows(model, batch, 2)
    seen = rows_fed(base)
    with torch.no_grad(), adapter_disabled(model):
        reference = continuation_logprobs(model, batch, 2).logprobs
    assert seen == [4]
    real = batch.response_mask
    torch.testing.assert_close(reference[real], expected_reference[real], atol=2e-5, rtol=0)
    assert (continuation_logprobs(model, batch, 2).logprobs - reference)[real].abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_under_bf16_autocast_sharing_costs_no_more_than_bf16_does(model_type, implementation):
    model = tiny_model(model_type, **WIDE.get(model_type, {}))
    model.set_attn_implementation(implementation)
    batch = shared_batch(4)
    real = batch.response_mask
    with torch.no_grad():
        exact = response_logprobs(model, batch).logprobs[real]
        with torch.autocast("cpu", torch.bfloat16):
            separate = response_logprobs(model, batch).logprobs[real]
            shared = continuation_logprobs(model, batch, 4).logprobs[real]
    rounding = (separate - exact).abs().mean()
    assert 0 < (shared - exact).abs().mean() < 1.5 * rounding
    assert (shared - separate).abs().mean() < 1.5 * rounding


def test_weights_in_bf16_share_prompts(rows_fed):
    model = tiny_model("llama").to(torch.bfloat16)
    batch = shared_batch(2)
    head_is_plain(model)
    assert can_share_prompt(model)
    seen = rows_fed(model)
    shared = continuation_logprobs(model, batch, 2).logprobs
    assert seen == [4] and shared.dtype == torch.float32
    separate = response_logprobs(model, batch).logprobs
    assert (shared - separate)[batch.response_mask].abs().mean() < 0.05


# --- what a response may see ------------------------------------------------------------------------------


def test_packed_rows_are_those_drawn_by_hand():
    # Query 0 is [3, 4] with responses [5, 6, 7] and [8, 9]; query 1 is [10] with [11] and [12, 13].
    batch = pad_batch([[3, 4], [10]] * 2, [[5, 6, 7], [11], [8, 9], [12, 13]], PAD)
    packed = pack_rows(batch, 2)
    # The last token of a response is not fed: it predicts nothing.
    assert packed.ids.tolist() == [[3, 4, 5, 6, 8], [10, 12, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert packed.attends[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert packed.attends[1, :2].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    # Separate rows are 3 4 5 6 7 | . 10 11 . . | 3 4 8 9 . | . 10 12 13 ., numbered from the left, end to end.
    assert packed.sources[0].tolist() == [0, 1, 2, 3, 12]
    assert packed.sources[1, :2].tolist() == [6, 17]
    # 5 6 7 | 11 | 8 9 | 12 13, each from the token before it
    rows, columns = packed.predicting
    assert rows.tolist() == [0, 0, 0, 1, 0, 0, 1, 1]
    assert columns.tolist() == [1, 2, 3, 0, 1, 4, 0, 1]


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_a_response_does_not_see_the_others(model_type):
    model = tiny_model(model_type)
    batch = shared_batch(3)
    changed = batch.responses.clone()
    changed[4:8] = (changed[4:8] + 7) % VOCAB_SIZE
    other = PaddedBatch(batch.queries, batch.query_mask, changed, batch.response_mask)
    with torch.no_grad():
        before = continuation_logprobs(model, batch, 3).logprobs
        after = continuation_logprobs(model, other, 3).logprobs
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[8:], after[8:])
    assert not torch.equal(before[4:8], after[4:8])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_never_seen(implementation):
    model = tiny_model("gpt_neox")
    model.set_attn_implementation(implementation)
    inside, outside = shared_batch(2), shared_batch(2, pad_id=VOCAB_SIZE + 5)
    wide = pad_batch(
        [q[m].tolist() for q, m in zip(inside.queries, inside.query_mask, strict=True)],
        [r[m].tolist() for r, m in zip(inside.responses, inside.response_mask, strict=True)],
        PAD,
        query_length=25,
        response_length=14,
    )
    with torch.no_grad():
        expected = continuation_logprobs(model, inside, 2).logprobs
        assert torch.equal(expected, continuation_logprobs(model, outside, 2).logprobs)
        widened = continuation_logprobs(model, wide, 2).logprobs
    torch.testing.assert_close(widened[wide.response_mask], expected[inside.response_mask], atol=2e-5, rtol=0)


# --- memory and call pattern ------------------------------------------------------------------------------


def test_logits_of_real_response_tokens_alone_a_chunk_at_a_time_in_one_head_call():
    model = tiny_model("gpt_neox")
    batch = shared_batch(2)
    can_share_prompt(model), head_is_plain(model)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args))
    num_real = int(batch.response_mask.sum())
    for chunk_size in (7, 1000):
        calls.clear()
        with logit_rows(VOCAB_SIZE) as rows:
            continuation_logprobs(model, batch, 2, chunk_size=chunk_size)
        assert sum(rows) == num_real < batch.responses.numel() and max(rows) == min(chunk_size, num_real)
        assert len(calls) == 1


def test_a_batch_without_response_tokens_makes_the_same_calls():
    model = tiny_model("gpt_neox")
    batch = shared_batch(2)
    can_share_prompt(model), head_is_plain(model)
    calls = []
    model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args))
    none = torch.zeros_like(batch.response_mask)
    empty = PaddedBatch(batch.queries, batch.query_mask, batch.responses, none)
    logprobs = continuation_logprobs(model, empty, 2).logprobs
    assert logprobs.shape == batch.responses.shape and len(calls) == 1
    logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_capped_head_sees_real_response_tokens_alone_too():
    model = tiny_model("gemma2", **WIDE["gemma2"])
    batch = shared_batch(2)
    can_share_prompt(model), head_is_plain(model)
    with logit_rows(VOCAB_SIZE) as rows:
        continuation_logprobs(model, batch, 2)
    assert rows == [int(batch.response_mask.sum())]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, VOCAB_SIZE), "and is left as it was"


# --- the way back to separate rows ------------------------------------------------------------------------


def assert_falls_back(model, rows_fed, num_continuations=2) -> None:
    batch = shared_batch(num_continuations)
    head_is_plain(model)
    can_share_prompt(model)
    seen = rows_fed(model)
    shared = continuation_logprobs(model, batch, num_continuations).logprobs
    assert seen == [num_continuations * len(QUERY_LENGTHS)]
    assert torch.equal(shared, response_logprobs(model, batch).logprobs)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FURTHER = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "lfm2": {**SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {**SMALL, "num_hidden_layers": 3, "lru_width": 32},
}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("bloom", {}),
        ("falcon", {"alibi": True}),
        ("gpt_neo", {"window_size": 6}),
        ("lfm2", {}),
        ("qwen3_next", {}),
    ],
)
def test_models_that_cannot_share_get_separate_rows(model_type, config, rows_fed, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, model_type, {**ARCHITECTURES, **HYBRIDS, **FURTHER}[model_type])
    assert_falls_back(tiny_model(model_type, **config), rows_fed)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("bloom", {}), ("falcon", {"alibi": True}), ("lfm2", {}), ("recurrent_gemma", {})],
)
def test_layers_that_mix_positions_otherwise_are_told_before_any_probe(model_type, config, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, model_type, FURTHER.get(model_type, ARCHITECTURES.get(model_type)))
    model = tiny_model(model_type, **config)
    probes = []
    model.get_input_embeddings().register_forward_hook(lambda *args: probes.append(args))
    assert not can_share_prompt(model) and not probes


@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_a_narrow_window_gets_separate_rows(model_type, rows_fed):
    assert_falls_back(tiny_model(model_type), rows_fed)


def test_local_layers_with_wide_windows_share(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "gpt_neo", FURTHER["gpt_neo"])
    model = tiny_model("gpt_neo", window_size=256)
    assert can_share_prompt(model)
    assert_equals_separate_rows(model, shared_batch(2), 2)


def test_a_window_counts_only_where_it_would_hide_something(rows_fed):
    batch = shared_batch(2)
    row_length = batch.queries.shape[1] + 2 * (batch.responses.shape[1] - 1)
    model = tiny_model("mistral", sliding_window=row_length)
    assert_equals_separate_rows(model, batch, 2)
    head_is_plain(model)
    seen = rows_fed(model)
    continuation_logprobs(model, batch, 2)
    assert seen == [4]
    assert_falls_back(tiny_model("mistral", sliding_window=row_length - 1), rows_fed)


def test_windows_by_any_name():
    assert narrowest_window(tiny_model("llama").config) == float("inf")
    assert narrowest_window(tiny_model("gemma2", sliding_window=20).config) == 20
    from transformers import GPTNeoConfig, Llama4TextConfig, Qwen2Config

    assert narrowest_window(GPTNeoConfig(window_size=31)) == 31
    assert narrowest_window(Llama4TextConfig(attention_chunk_size=77)) == 77
    assert narrowest_window(Qwen2Config(use_sliding_window=False, sliding_window=8)) == float("inf")


def test_attention_kernels_without_a_mask_get_separate_rows():
    model = tiny_model("llama")
    assert can_share_prompt(model)
    model.config._attn_implementation = "flash_attention_2"
    probes = []
    model.get_input_embeddings().register_forward_hook(lambda *args: probes.append(args))
    assert not can_share_prompt(model) and not probes
    model.config._attn_implementation = "sdpa"
    assert can_share_prompt(model)


class Deaf(nn.Module):
    """A backbone that does not listen to one of its inputs."""

    def __init__(self, backbone: nn.Module, deaf_to: str) -> None:
        super().__init__()
        self.backbone, self.deaf_to = backbone, deaf_to

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
        if attention_mask.dim() == 4:
            inputs.pop(self.deaf_to)
        return self.backbone(input_ids=input_ids, use_cache=use_cache, **inputs)


@pytest.mark.parametrize("deaf_to", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_a_model_that_ignores_the_mask_or_the_positions(deaf_to, dtype):
    model = tiny_model("gpt2").to(dtype)
    deaf = Deaf(model.transformer, deaf_to)
    deaf.get_input_embeddings = model.get_input_embeddings
    deaf.config = model.config
    from drpo.models.shared_prompt import _probe

    assert _probe(model.transformer)
    assert not _probe(deaf)


def test_the_probe_rounds_as_the_weights_do_not_as_autocast_does():
    model = tiny_model("gpt_neox")
    dtypes = set()
    linear = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    linear.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert can_share_prompt(model)
    assert dtypes == {torch.float32}


def test_the_probe_runs_once_per_model(rows_fed):
    model = tiny_model("gpt_neox")
    seen = rows_fed(model)
    can_share_prompt(model)
    probes = len(seen)
    assert probes > 0 and can_share_prompt(model) and len(seen) == probes


# --- refusals ---------------------------------------------------------------------------------------------


def test_rejects_rows_that_are_no_blocks():
    model, batch = tiny_model("llama"), shared_batch(2)
    with pytest.raises(ValueError, match="8 rows are not 3 blocks"):
        continuation_logprobs(model, batch, 3)
    with pytest.raises(ValueError, match="differ in their queries"):
        continuation_logprobs(model, batch.select([0, 1, 2, 3, 0, 1, 3, 2]), 2)
    with pytest.raises(ValueError, match="chunk_size"):
        continuation_logprobs(model, batch, 2, chunk_size=0)
