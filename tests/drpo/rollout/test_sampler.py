from __future__ import annotations

import numpy as np
import pytest
import torch
from sampled import generate
from scipy import stats
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

from drpo.rollout.sampler import SamplingConfig, draw_uniforms, sample_tokens

STOP, PAD = 1, 2
GREEDY = SamplingConfig(temperature=0.0)


def ragged_contexts(lengths=(3, 30, 1, 12, 12, 7, 25), seed=0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def run(model, contexts, budgets, *, episodes=None, seed=7, length=12, **settings) -> list[list[int]]:
    settings = {
        "sampling": SamplingConfig(),
        "stop_ids": [STOP],
        "suppressed_ids": [PAD],
        "batch_size": 4,
        **settings,
    }
    uniforms = draw_uniforms(seed, range(len(contexts)) if episodes is None else episodes, length)
    return generate(model, contexts, budgets, uniforms, **settings)


def naive_row(model, context, budget, uniforms, *, temperature=1.0, stop_ids=(STOP,), suppressed=(PAD,)):
    """One row, no cache, no padding: a plain cumulative sum over the whole vocabulary at every token."""
    new: list[int] = []
    while len(new) < budget and (not new or new[-1] not in stop_ids):
        with torch.no_grad():
            logits = model(torch.tensor([list(context) + new])).logits[0, -1].double() / temperature
        logits[list(suppressed)] = -torch.inf
        cdf = torch.softmax(logits, dim=-1).numpy().cumsum()
        new.append(int(np.searchsorted(cdf, uniforms[len(new)].item() * cdf[-1], side="right")))
    return new


# --- the uniform numbers ----------------------------------------------------------------------------------


def test_uniforms_depend_on_seed_and_episode_alone():
    numbers = draw_uniforms(3, [10, 11, 12], 6)
    assert numbers.shape == (3, 6) and numbers.dtype == torch.float64
    assert torch.equal(draw_uniforms(3, [12, 10], 6), numbers[[2, 0]])
    assert torch.equal(draw_uniforms(3, [10, 11, 12], 4), numbers[:, :4])
    assert not torch.isin(draw_uniforms(4, [10, 11, 12], 6), numbers).any()
    assert draw_uniforms(3, [], 6).shape == (0, 6)


def test_uniforms_are_uniform():
    numbers = draw_uniforms(0, range(400), 25)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(numbers[:, 0].numpy(), "uniform").pvalue > 1e-3


# --- one token ------------------------------------------------------------------------------------------


def naive_token(logits: list[float], u: float, temperature=1.0, top_k=0, top_p=1.0, suppressed=()) -> int:
    """The filters by sorting Python floats, then a walk along the cumulative sum."""
    weights = {v: np.exp(z / temperature) for v, z in enumerate(logits) if v not in suppressed}
    ranked = sorted(weights, key=lambda v: -weights[v])
    if top_k:
        ranked = ranked[:top_k]
    total = sum(weights[v] for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:
        kept.append(v)
        mass += weights[v] / total
        if mass >= top_p:
            break
    total, mass = sum(weights[v] for v in kept), 0.0
    for v in sorted(kept):
        mass += weights[v] / total
        if mass > u:
            return v
    raise AssertionError("unreachable for u < 1")


@pytest.mark.parametrize("vocab_size", [5, 256, 700])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.55},
        {"temperature": 1.7, "top_k": 4, "top_p": 0.8},
        {"top_k": 10_000},
    ],
)
def test_tokens_equal_the_naive_filters(vocab_size, settings):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(200, vocab_size, generator=generator) * 2
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    got = sample_tokens(logits, uniforms, SamplingConfig(**settings), suppressed_ids=[1])[0]
    expected = [
        naive_token(row, u, **settings, suppressed=[1])
        for row, u in zip(logits.double().tolist(), uniforms.tolist(), strict=True)
    ]
    assert got.tolist() == expected


def test_hand_computed_inverse_cdf():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.9999], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, SamplingConfig())[0].tolist() == [0, 0, 1, 1, 2, 3]
    # top_p 0.7 keeps 0.4 and 0.3, which become 4/7 (token 3) and 3/7 (token 2).
    uniforms = torch.tensor([0.0, 0.428, 0.429, 0.9999, 0.2, 0.6], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, SamplingConfig(top_p=0.69))[0].tolist() == [2, 2, 3, 3, 2, 3]


@pytest.mark.parametrize("u", [0.0, 0.5, float(np.nextafter(1, 0))])
def test_tokens_without_mass_are_never_chosen(u):
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 301, 640]] = torch.tensor([0.0, -1.0, -60.0])
    uniforms = torch.tensor([u], dtype=torch.float64)
    assert sample_tokens(logits, uniforms, SamplingConfig())[0].item() in (300, 301, 640)
    assert sample_tokens(logits, uniforms, SamplingConfig(), [640, 300])[0].item() == 301


def test_bf16_logits_are_sampled_in_full_precision():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        low = sample_tokens(logits, uniforms, SamplingConfig(temperature=0.7, top_p=0.9))[0]
    assert torch.equal(low, sample_tokens(logits.float(), uniforms, SamplingConfig(0.7, top_p=0.9))[0])


# --- whole rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_rows_equal_a_naive_loop_without_cache(model_type):
    model = tiny_model(model_type)
    contexts = ragged_contexts()
    budgets = [12, 3, 12, 0, 7, 12, 1]
    uniforms = draw_uniforms(7, range(len(contexts)), 12)
    expected = [
        naive_row(model, context, budget, row)
        for context, budget, row in zip(contexts, budgets, uniforms, strict=True)
    ]
    assert run(model, contexts, budgets) == expected


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_greedy_equals_transformers_generate(model_type):
    model = tiny_model(model_type)
    contexts = ragged_contexts()
    got = run(model, contexts, [12] * len(contexts), sampling=GREEDY, batch_size=7)
    for context, tokens in zip(contexts, got, strict=True):
        reference = model.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=STOP,
            pad_token_id=PAD,
            suppress_tokens=[PAD],
        )
        assert tokens == reference[0, len(context) :].tolist()


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "mistral"])
def test_rows_do_not_depend_on_batch_size_order_or_neighbours(model_type):
    model = tiny_model(model_type)
    contexts, budgets = ragged_contexts(), [12, 3, 12, 5, 7, 12, 1]
    expected = run(model, contexts, budgets)
    for batch_size in (1, 2, 100):
        assert run(model, contexts, budgets, batch_size=batch_size) == expected
    order = [4, 2, 6, 0, 5, 1, 3]
    shuffled = run(model, [contexts[i] for i in order], [budgets[i] for i in order], episodes=order)
    assert shuffled == [expected[i] for i in order]
    assert run(model, contexts[2:4], budgets[2:4], episodes=[2, 3]) == expected[2:4]


def test_a_prefix_in_the_context_equals_having_sampled_it():
    model = tiny_model("llama")
    contexts = ragged_contexts()
    whole = run(model, contexts, [12] * len(contexts), stop_ids=[])
    for taken in (1, 5, 11):
        uniforms = draw_uniforms(7, range(len(contexts)), 12)[:, taken:]
        continued = generate(
            model,
            [context + tokens[:taken] for context, tokens in zip(contexts, whole, strict=True)],
            [12 - taken] * len(contexts),
            uniforms,
            sampling=SamplingConfig(),
            stop_ids=[],
            suppressed_ids=[PAD],
            batch_size=4,
        )
        assert continued == [tokens[taken:] for tokens in whole]


def test_equal_contexts_are_sampled_apart():
    model = tiny_model("qwen2")
    contexts = [[5, 6, 7], [9, 9], [5, 6, 7], [5, 6, 7]]
    budgets = [8, 4, 2, 8]
    uniforms = draw_uniforms(7, range(4), 12)
    expected = [naive_row(model, c, b, u) for c, b, u in zip(contexts, budgets, uniforms, strict=True)]
    assert run(model, contexts, budgets, batch_size=8) == expected
    assert expected[0] != expected[3]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_pairs_follow_the_exact_distribution(temperature):
    vocab_size, num_rows = 6, 6000
    model = tiny_model("gpt_neox", vocab_size=vocab_size)
    context = [4, 3, 5]
    rows = run(
        model,
        [context] * num_rows,
        [2] * num_rows,
        length=2,
        stop_ids=[],
        batch_size=1000,
        sampling=SamplingConfig(temperature=temperature),
    )
    counts = np.zeros((vocab_size, vocab_size))
    np.add.at(counts, tuple(np.array(rows).T), 1)

    def next_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            weights = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).exp().numpy()
        weights[PAD] = 0
        return weights / weights.sum()

    probs = next_probs(context)
    expected = num_rows * np.stack([probs[v] * next_probs(context + [v]) for v in range(vocab_size)])
    assert counts[PAD].sum() == counts[:, PAD].sum() == 0
    allowed = [v for v in range(vocab_size) if v != PAD]
    counts, expected = (table[np.ix_(allowed, allowed)].ravel() for table in (counts, expected))
    rare = expected < 5
    pooled = [np.append(table[~rare], table[rare].sum()) for table in (counts, expected)]
    keep = pooled[1] > 0
    assert stats.chisquare(pooled[0][keep], pooled[1][keep]).pvalue > 1e-3


def test_stops_at_any_stop_id_and_returns_it():
    model = tiny_model("gpt2")
    contexts = ragged_contexts([4] * 40)
    stop_ids = [STOP, 17, 23, 40, 55]
    rows = run(model, contexts, [12] * 40, stop_ids=stop_ids, batch_size=16)
    ended = [tokens for tokens in rows if tokens[-1] in stop_ids]
    assert {tokens[-1] for tokens in ended} > {17, 23} and len(ended) < 40
    for tokens in rows:
        assert not set(tokens[:-1]) & set(stop_ids)
        assert tokens in ended or len(tokens) == 12


def test_suppressed_ids_are_never_sampled():
    model = tiny_model("gpt_neox", vocab_size=6)
    contexts = [[3, 4]] * 50
    for sampling in (SamplingConfig(), SamplingConfig(temperature=5.0), GREEDY):
        rows = run(model, contexts, [12] * 50, sampling=sampling, suppressed_ids=[PAD, 0, 99], stop_ids=[])
        assert not {PAD, 0} & {token for row in rows for token in row}
        assert all(len(row) == 12 for row in rows)


def test_the_last_learned_position_can_be_reached_beside_a_longer_row():
    model = tiny_model("gpt2")
    contexts = ragged_contexts([58, 50])
    rows = run(model, contexts, [6, 12], stop_ids=[], batch_size=2)
    assert [len(row) for row in rows] == [6, 12]
    # The first row ends at step 6 and may linger in the batch, past the 64 positions that the model has.
    contexts = ragged_contexts([58] + [50] * 9)
    assert [len(row) for row in run(model, contexts, [6] + [12] * 9, stop_ids=[], batch_size=10)][0] == 6


def test_no_rows_and_no_budget():
    model = tiny_model("gpt2")
    assert run(model, [], []) == []
    assert run(model, [[3], [4, 5]], [0, 0]) == [[], []]


def test_every_module_keeps_its_mode_and_checkpointing_does_not_disturb():
    model = tiny_model("llama")
    contexts = ragged_contexts()
    expected = run(model, contexts, [6] * 7)
    model.gradient_checkpointing_enable()
    model.train()
    model.lm_head.eval()
    assert run(model, contexts, [6] * 7) == expected
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_training_after_sampling_in_one_autocast_context_has_gradients():
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        run(model, [[3, 4, 5]], [4])
        model(torch.tensor([[3, 4, 5]])).logits.float().sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_logits_that_are_not_finite_stop_the_run():
    for sampling in (SamplingConfig(), GREEDY):
        model = tiny_model("gpt2")
        with torch.no_grad():
            model.lm_head.weight[5] = torch.nan
        with pytest.raises(FloatingPointError, match="token 0 after a context of 3 tokens"):
            run(model, [[7, 8, 9]], [4], sampling=sampling)


@pytest.mark.parametrize(
    ("contexts", "budgets", "message"),
    [
        ([[3], []], [2, 2], "context 1 is empty"),
        ([[3]], [13], r"max_new_tokens\[0\] is 13"),
        ([[3]], [2, 2], "one of each per row"),
    ],
)
def test_rejects_bad_arguments(contexts, budgets, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_model("gpt2"), contexts, budgets)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": 0.0, "top_k": 5}, "top_k"),
    ],
)
def test_config_names_the_bad_key(settings, key):
    with pytest.raises(ValueError, match=f"^{key} "):
        SamplingConfig(**settings)
