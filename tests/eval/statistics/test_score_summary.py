"""Distributions of scores and agreement of models, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics.score_summary import accuracy_gain, accuracy_over_seeds, distribution, model_agreement


def test_a_distribution_by_hand():
    found = distribution([1.0, 2.0, 3.0, 4.0])
    assert (found.n, found.mean) == (4, 2.5)
    assert found.deviation == pytest.approx(np.sqrt(5 / 3))
    assert (found.quantiles["0"], found.quantiles["0.5"], found.quantiles["1"]) == (1, 2.5, 4)
    assert distribution([1.0]).deviation is None


def test_agreement_of_two_models_by_hand():
    """Signs agree on 3 of 4; accuracies 3/4 and 1/2, so chance is 3/8 + 1/8 = 1/2 and kappa (3/4 - 1/2) / (1/2)."""
    (found,) = model_agreement({"one": [1.0, 2.0, 3.0, -1.0], "two": [1.0, 2.0, -1.0, -3.0]})
    assert found.models == ("one", "two")
    assert found.signs.agreement == 0.75
    assert found.signs.kappa == pytest.approx(0.5)
    # Ranks 2, 3, 4, 1 and 3, 4, 2, 1: squared differences 1 + 1 + 4 + 0 = 6, 1 - 6 * 6 / (4 * 15)
    assert found.spearman == pytest.approx(0.4)


def test_every_two_models_are_compared():
    margins = dict(zip("abc", np.random.default_rng(0).normal(size=(3, 20)), strict=True))
    assert [found.models for found in model_agreement(margins)] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert model_agreement({"a": [1.0, 2.0]}) == []


def test_a_constant_model_has_no_rank_correlation():
    (found,) = model_agreement({"one": [1.0, 1.0, 1.0], "two": [1.0, 2.0, -1.0]})
    assert found.spearman is None and found.signs.agreement == pytest.approx(2 / 3)


def test_accuracy_over_seeds_by_hand():
    rng = np.random.default_rng(1)
    margins = {"a": rng.normal(0.5, 1, 50), "b": rng.normal(0.5, 1, 50)}
    found = accuracy_over_seeds(margins)
    expected = np.mean([(values > 0).mean() for values in margins.values()])
    assert found.value == pytest.approx(expected) and found.low < expected < found.high
    assert accuracy_over_seeds({"a": margins["a"]}) is None


def test_the_gain_of_an_ensemble_by_hand():
    """Prompt a: 1 - (1 + 1/2) / 2 = 1/4 and 0 - (1 + 0) / 2 = -1/2, mean -1/8; prompt b: 1 - 0 = 1."""
    members = {"one": [1.0, 2.0, -1.0], "two": [0.0, -2.0, -3.0]}
    found = accuracy_gain([2.0, -1.0, 0.1], members, ["a", "a", "b"])
    assert found.value == pytest.approx((-1 / 8 + 1) / 2) and found.num_prompts == 2
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert accuracy_gain([1.0, -1.0], {"one": [1.0, -1.0]}, ["a", "b"]).value == 0
    assert accuracy_gain([1.0, -1.0], {"one": [1.0, -1.0]}, ["a", "a"]) is None
