"""The preference losses against hand values, the papers' own forms in plain Python, limits and extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from drpo.preference_losses import (
    apo_down_loss,
    apo_zero_loss,
    cdpo_loss,
    dpo_loss,
    dr_dpo_loss,
    dr_dpo_weights,
    hinge_loss,
    implicit_margins,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    score_offsets,
    simpo_loss,
    sppo_loss,
    token_weighted_sum,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
ONES = torch.ones(2)
BETA, E, ALPHA, Z0 = 0.4, 0.2, 0.3, torch.tensor(0.7, dtype=torch.float64)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, float64(*expected).reshape(got.shape), check_dtype=False)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nll(c: float, r: float) -> float:
    """Bradley-Terry with the implicit reward beta log u, so with strengths u^beta."""
    return -math.log(math.exp(c) ** BETA / (math.exp(c) ** BETA + math.exp(r) ** BETA))


def of_margin(loss, *args):
    return lambda c, r: loss(implicit_margins(c, r, BETA), *args)


def kto(desirable: bool):
    return lambda c, _: kto_loss(c, torch.full(c.shape, desirable), Z0, BETA, 1.5, 0.5)


LOSSES = {
    "dpo": of_margin(dpo_loss),
    "cdpo": of_margin(cdpo_loss, E),
    "robust": of_margin(robust_dpo_loss, E),
    "hinge": of_margin(hinge_loss),
    "ipo": of_margin(ipo_loss, BETA),
    "apo_zero": lambda c, r: apo_zero_loss(c, r, BETA),
    "apo_down": lambda c, r: apo_down_loss(c, r, BETA),
    "sppo": lambda c, r: sppo_loss(c, r, BETA),
    "simpo": lambda c, r: simpo_loss(c, r, 2.0, 0.5),
    "orpo": lambda c, r: orpo_loss(c, r, 0.3),
    "kto desirable": kto(True),
    "kto undesirable": kto(False),
}
PAPER_FORMS = {
    "dpo": nll,
    "cdpo": lambda c, r: (1 - E) * nll(c, r) + E * nll(r, c),
    "robust": lambda c, r: ((1 - E) * nll(c, r) - E * nll(r, c)) / (1 - 2 * E),
    "hinge": lambda c, r: max(0.0, 1 - BETA * c + BETA * r),
    "ipo": lambda c, r: (math.log(math.exp(c) / math.exp(r)) - 1 / BETA / 2) ** 2,
    "apo_zero": lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r: 1 + sigmoid(BETA * c) - sigmoid(BETA * c - BETA * r),
    # (log u - eta (P - 1/2))^2, P = 1 for the chosen and 0 for the rejected response
    "sppo": lambda c, r: (c - (1 - 0.5) / BETA) ** 2 + (r - (0 - 0.5) / BETA) ** 2,
    "simpo": lambda c, r: -math.log(math.exp(2 * c) / (math.exp(2 * c) + math.exp(2 * r + 0.5))),
    # odds = 1 / (1/p - 1), and -log sigmoid(log ratio) = log(1 + 1 / ratio)
    "orpo": lambda c, r: -c + 0.3 * math.log(1 + math.expm1(-c) / math.expm1(-r)),
    "kto desirable": lambda c, _: 1.5 - 1.5 * sigmoid(BETA * (c - 0.7)),
    "kto undesirable": lambda c, _: 0.5 - 0.5 * sigmoid(BETA * (0.7 - c)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_papers_form(name):
    paper = PAPER_FORMS[name]
    chosen = (-2 * randn(0, 40).abs() - 0.01).requires_grad_()  # negative: also valid mean log-probabilities
    rejected = (-2 * randn(1, 40).abs() - 0.01).requires_grad_()
    losses = LOSSES[name](chosen, rejected)
    assert losses.shape == (40,)
    grads = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True)
    for i, (c, r) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        assert losses[i].item() == pytest.approx(paper(c, r), rel=1e-9, abs=1e-12)
        d = 1e-6
        slopes = (paper(c + d, r) - paper(c - d, r)) / (2 * d), (paper(c, r + d) - paper(c, r - d)) / (2 * d)
        assert [g[i].item() for g in grads] == pytest.approx(slopes, rel=1e-4, abs=1e-7)


def test_by_hand():
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
    check(dpo_loss(float64(0, LN3, -LN3)), LN2, LN4 - LN3, LN4)
    check(dpo_loss(float64(-1e4, 1e4)), 1e4, 0)
    # 0.9 l(h) + 0.1 l(-h)
    check(cdpo_loss(float64(LN3, -LN3), 0.1), LN4 - 0.9 * LN3, LN4 - 0.1 * LN3)
    # (0.75 l(h) - 0.25 l(-h)) / 0.5 = 1.5 l(h) - 0.5 l(-h)
    check(robust_dpo_loss(float64(LN3, -LN3), 0.25), LN4 - 1.5 * LN3, LN4 + 0.5 * LN3)
    check(hinge_loss(float64(-1, 0, 0.25, 1, 3)), 2, 1, 0.75, 0, 0)
    check(ipo_loss(float64(0, 0.5, 1), 0.1), 25, 0, 25)  # h / 0.1 against 5
    # r_w, r_l = ln 3, -ln 3: 1/4 + 1/4; swapped 3/4 + 3/4
    check(apo_zero_loss(float64(2 * LN3, -2 * LN3), float64(-2 * LN3, 2 * LN3), 0.5), 0.5, 1.5)
    # r_w, r_l = 0, -ln 3: 1/2 + 1/4; -ln 3, 0: 1/4 + 3/4
    check(apo_down_loss(float64(0, -2 * LN3), float64(-2 * LN3, 0), 0.5), 0.75, 1)
    check(sppo_loss(float64(2, 3, 0), float64(-2, -2, 0), 0.25), 0, 1, 8)  # targets 2 and -2
    # 2 (-0.5 + 1) - (1 - ln 3) = ln 3
    check(simpo_loss(float64(-0.5), float64(-1), 2.0, 1 - LN3), LN4 - LN3)
    # p_w = 3/4 has odds 3, p_l = 1/2 has odds 1: ln(4/3) + 2 * -ln(3/4)
    check(orpo_loss(float64(math.log(0.75)), float64(-LN2), 2.0), 3 * (LN4 - LN3))
    # float32 where p_l is nearly 1: odds_l = 1 / (e^1e-5 - 1) = 99999.5, odds_w = 1
    check(orpo_loss(torch.tensor([-LN2]), torch.tensor([-1e-5]), 1.0), LN2 + math.log(100000.5))


def test_margins_by_hand():
    # u_w = 2, u_l = 1/2, beta 0.5
    #   reverse_kl  ln 2 + ln 2 = 2 ln 2                       forward_kl  -1/2 + 2 = 3/2
    #   js          ln(4/3) - ln(1 / 1.5) = ln 2               alpha 1/2   2 (1 - 2^-.5) - 2 (1 - 2^.5) = 2^.5
    by_hand = {"reverse_kl": 2 * LN2, "forward_kl": 1.5, "js": LN2, "alpha": math.sqrt(2)}
    for divergence, difference in by_hand.items():
        check(implicit_margins(float64(LN2), float64(-LN2), 0.5, divergence, 0.5), 0.5 * difference)


GENERATORS = {  # f of D_f(pi || ref) = sum ref f(pi / ref)
    "reverse_kl": lambda u: u * np.log(u),
    "forward_kl": lambda u: -np.log(u),
    "js": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "alpha": lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1)),
}


@pytest.mark.parametrize("divergence", GENERATORS)
def test_a_policy_is_optimal_for_the_rewards_that_its_margins_imply(divergence):
    # The defining property: pi maximises E[r] - beta D_f(pi || ref) when r differs by the margins.
    rng = np.random.default_rng(0)
    pi, ref = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    logratios = torch.from_numpy(np.log(pi / ref))
    rewards = implicit_margins(logratios, logratios[:1].expand(5), BETA, divergence, ALPHA).numpy()

    def objective(p: np.ndarray) -> np.ndarray:
        return p @ rewards - BETA * (ref * GENERATORS[divergence](p / ref)).sum(axis=-1)

    step = 1e-4 * rng.standard_normal((300, 5))
    near = pi * np.exp(step - (pi * step).sum(axis=1, keepdims=True))
    others = np.concatenate([near / near.sum(axis=1, keepdims=True), rng.dirichlet(np.ones(5), 300)])
    assert (objective(others) < objective(pi)).all()


def test_alpha_runs_from_reverse_to_forward_kl():
    c, r = randn(2, 30), randn(3, 30)
    for alpha, expected in ((1e-6, c - r), (1.0, (-r).exp() - (-c).exp())):
        got = implicit_margins(c, r, 1.0, "alpha", alpha)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_forward_kl_is_exact_to_20_nats_and_goes_on_as_the_tangent():
    logratios = torch.tensor([-19.5, -20.0, -30.0, -1e4], requires_grad=True)
    margins = implicit_margins(torch.zeros(4), logratios, 1.0, "forward_kl")
    below, top = math.exp(19.5), math.exp(20)
    check(margins, below - 1, top - 1, 11 * top - 1, (1e4 - 19) * top - 1)
    margins.sum().backward()
    check(logratios.grad, -below, -top, -top, -top)


def test_robust_dpo_is_unbiased_under_flips_and_cdpo_ends_at_the_log_odds_of_a_right_label():
    margins = 5 * randn(4, 50)
    true = torch.log1p(torch.exp(-margins))
    seen = 0.7 * robust_dpo_loss(margins, 0.3) + 0.3 * robust_dpo_loss(-margins, 0.3)
    for losses in (seen, robust_dpo_loss(margins, 0.0), cdpo_loss(margins, 0.0)):
        torch.testing.assert_close(losses, true)
    best = float64(math.log(9), 1, 4).requires_grad_()  # (1 - 0.1) / 0.1 = 9
    cdpo_loss(best, 0.1).sum().backward()
    assert abs(best.grad[0]) < 1e-12 and best.grad[1] < 0 < best.grad[2]


def test_offsets_by_hand():
    gaps = float64(0.5, 1, 3)
    check(score_offsets(gaps, 2.0, "identity"), 1, 2, 6)
    check(score_offsets(gaps, 2.0, "log"), -2 * LN2, 0, 2 * LN3)
    check(score_offsets(gaps, 2.0, "log1p"), 2 * math.log(1.5), 2 * LN2, 2 * LN4)
    check(score_offsets(float64(0, -3), 2.0, "identity"), 0, -6)
    check(score_offsets(float64(0), 2.0, "log1p"), 0)


def test_an_offset_is_the_lead_that_gumbel_noise_must_leave():
    # ODPO's derivation: with Gumbel noise on both rewards, P(the chosen leads by more than d) = exp(-loss).
    rng = np.random.default_rng(1)
    lead = 1.2 + rng.gumbel(size=400_000) - rng.gumbel(size=400_000)
    loss = dpo_loss(float64(1.2) - score_offsets(float64(0.8), 0.5, "identity"))
    assert math.exp(-loss.item()) == pytest.approx((lead > 0.4).mean(), abs=0.004)  # standard error 0.0007


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    [
        (lambda x: implicit_margins(ONES, ONES, 0.1, "alpha", x), (0, -1, 1.5, math.nan), "alpha must be in"),
        (lambda x: implicit_margins(ONES, ONES, 0.1, x), ("kl",), "divergence must be .* got 'kl'"),
        (lambda x: cdpo_loss(ONES, x), (0.5, 0.7, -0.1, math.nan), "label_smoothing .* must be in"),
        (lambda x: robust_dpo_loss(ONES, x), (0.5, 0.7, -0.1, math.nan), "label_smoothing .* must be in"),
        (lambda x: score_offsets(float64(1, x), 1.0, "log"), (0, -1, math.nan), "'log' needs .* positive"),
        (
            lambda x: score_offsets(float64(1, x), 1.0, "log1p"),
            (-0.1, math.nan),
            "'log1p' needs .* at least 0",
        ),
        (lambda x: score_offsets(ONES, 1.0, x), ("sqrt",), "scale must be .* got 'sqrt'"),
    ],
)
def test_what_has_no_value_is_refused(function, bad, message):
    for value in bad:
        with pytest.raises(ValueError, match=message):
            function(value)


def test_kto_by_hand_and_without_a_gradient_through_the_reference_point():
    # beta 0.5, z0 = 2: beta (logratio - z0) = ln 3 for a logratio of 2 + 2 ln 3
    kl = float64(2.0)[0].requires_grad_()
    logratios = float64(2 + 2 * LN3, 2 + 2 * LN3, 2).requires_grad_()
    losses = kto_loss(logratios, torch.tensor([True, False, True]), kl, 0.5, 1.0, 4.0)
    check(losses, 0.25, 3.0, 0.5)
    losses.sum().backward()
    assert kl.grad is None
    # slope of weight sigmoid: 0.5 * 3/16 down, 4 * 0.5 * 3/16 up, 0.5 * 1/4 down
    check(logratios.grad, -3 / 32, 3 / 8, -1 / 8)


def test_dr_dpo_by_hand():
    # beta' 1: mean(1, 1/3) = 2/3; weights 3 : 1.   beta' 2 with l = 2 ln 3: the same inside, times 2.
    check(dr_dpo_loss(float64(0, LN3), 1.0), math.log(1.5))
    check(dr_dpo_loss(float64(0, 2 * LN3), 2.0), 2 * math.log(1.5))
    check(dr_dpo_weights(float64(0, LN3), 1.0), 0.75, 0.25)
    # at beta' 1 it is -log of the mean win probability: of 1/4, 3/4, 1/2, 1/2 that is 1/2
    check(dr_dpo_loss(dpo_loss(float64(-LN3, LN3, 0, 0)), 1.0), LN2)


def test_dr_dpo_limits_and_shift():
    losses = randn(7, 9).abs()
    torch.testing.assert_close(dr_dpo_loss(losses, 1e7), losses.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dr_dpo_loss(losses, 1e-6), losses.min(), rtol=0, atol=1e-5)
    check(dr_dpo_loss(losses + 3, 0.5), dr_dpo_loss(losses, 0.5).item() + 3)


def test_dr_dpo_is_the_best_reweighting_that_pays_its_divergence():
    # Duality: the loss is the minimum over weights of sum w l + beta' KL(w || uniform), taken at its weights.
    losses = randn(8, 6).abs().numpy()
    weights = dr_dpo_weights(torch.from_numpy(losses), 0.7).numpy()

    def cost(w: np.ndarray) -> np.ndarray:
        return w @ losses + 0.7 * (w * np.log(6 * w)).sum(axis=-1)

    value = dr_dpo_loss(torch.from_numpy(losses), 0.7).item()
    assert cost(weights) == pytest.approx(value)
    assert (cost(np.random.default_rng(2).dirichlet(np.ones(6), 1000)) > value).all()


def test_dr_dpo_weights_are_its_gradient_also_over_micro_batches():
    losses = (3 * randn(9, 12)).requires_grad_()
    dr_dpo_loss(losses, 0.4).backward()
    (log_normaliser,) = float64(math.log(sum(math.exp(-x / 0.4) for x in losses.tolist())))
    parts = [dr_dpo_weights(part, 0.4, log_normaliser) for part in losses.split([1, 4, 7])]
    assert not any(part.requires_grad for part in parts)
    torch.testing.assert_close(torch.cat(parts), losses.grad)
    torch.testing.assert_close(dr_dpo_weights(losses, 0.4), losses.grad)


def test_token_weighted_sum_is_a_plain_loop_and_knows_nothing_under_the_mask():
    logprobs, weights = randn(10, 3, 4), randn(11, 3, 4).abs()
    mask = torch.tensor([[True, True, True, True], [True, False, True, False], [False] * 4])
    terms = (weights * logprobs).tolist()
    expected = [sum(terms[i][t] for t in range(4) if mask[i, t]) for i in range(3)]
    dirty = torch.where(mask, logprobs, math.nan).requires_grad_()
    got = token_weighted_sum(dirty, torch.where(mask, weights, math.inf), mask)
    check(got, *expected)
    got.sum().backward()
    torch.testing.assert_close(dirty.grad, torch.where(mask, weights, 0.0))


def assert_finite_with_gradients(loss, at: list[float]) -> None:
    c = torch.tensor([x for x in at for _ in at], requires_grad=True)
    r = torch.tensor(at * len(at), requires_grad=True)
    value = loss(c, r)
    grads = torch.autograd.grad(value.sum(), (c, r), allow_unused=True, materialize_grads=True)
    assert all(x.isfinite().all() for x in (value, *grads))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_stay_finite_in_float32(name):
    assert_finite_with_gradients(LOSSES[name], [0.0, -1e-30, -1e-9, -1e-4, -50.0, -1e4])
    if name != "orpo":  # a mean log-probability is never positive
        assert_finite_with_gradients(LOSSES[name], [1e4, 90.0, 0.0, -90.0, -1e4])


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("loss", [dpo_loss, lambda h: cdpo_loss(h, 0.1), hinge_loss])
def test_margins_of_every_divergence_stay_finite_and_ordered_in_float32(loss, divergence):
    at = [-1e4, -100.0, -90.0, -21.0, 0.0, 90.0, 1e4]
    assert_finite_with_gradients(lambda c, r: loss(implicit_margins(c, r, 0.1, divergence, ALPHA)), at)
    steps = implicit_margins(torch.tensor(at), torch.zeros(7), 0.1, divergence, ALPHA).diff()
    assert (steps[:4] > 0).all() and (steps >= 0).all()


@pytest.mark.parametrize("beta_prime", [1e-3, 1.0, 1e3])
def test_dr_dpo_stays_finite_where_the_plain_exponential_does_not(beta_prime):
    for values in ([1e4, 1e4 + 1], [-1e4, 1e4], [12.0, 500.0], [0.0, 0.0]):
        losses = torch.tensor(values, requires_grad=True)
        value = dr_dpo_loss(losses, beta_prime)
        value.backward()
        assert value.isfinite() and min(values) - 1e-2 <= value.item() <= max(values)
        assert losses.grad.sum().item() == pytest.approx(1, abs=1e-3)  # float32 near 1e4 has steps of 1e-3
        assert dr_dpo_weights(losses, beta_prime).sum().item() == pytest.approx(1)
