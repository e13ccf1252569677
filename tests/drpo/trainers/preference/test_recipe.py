"""Which choices go together: every combination that makes no sense is refused by the name of its key."""

from __future__ import annotations

import re

import pytest

from drpo.models.loading import LoraConfig, ModelConfig
from drpo.rollout.held_out import SampleConfig
from drpo.trainers.preference.curriculum import CurriculumConfig
from drpo.trainers.preference.recipe import (
    DrDPOConfig,
    LossConfig,
    LossName,
    OffsetConfig,
    PreferenceRecipe,
    ReferenceConfig,
    TokenWeightsConfig,
)

NEEDED = {
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"target_margin": 0.5},
    "orpo": {"odds_coef": 0.1},
}
NAMES = set(LossName.__args__)
OF_THE_MARGIN = {"dpo", "cdpo", "robust", "hinge"}
OPTIONS = {
    "label_smoothing": (0.1, {"cdpo", "robust"}),
    "target_margin": (0.5, {"simpo"}),
    "odds_coef": (0.1, {"orpo"}),
    "desirable_weight": (1.3, {"kto"}),
    "undesirable_weight": (1.3, {"kto"}),
    "offset": (OffsetConfig(), OF_THE_MARGIN),
    "dr_dpo": (DrDPOConfig(), NAMES - {"kto"}),
    "token_weights": (TokenWeightsConfig(), NAMES - {"kto", "ipo_avg", "simpo", "orpo"}),
    "divergence": ("js", OF_THE_MARGIN),
    "beta": (0.3, NAMES - {"orpo"}),
}


def loss(name: str, **keys) -> LossConfig:
    return LossConfig(name=name, **{**NEEDED.get(name, {}), **keys})


@pytest.mark.parametrize("key", OPTIONS)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_option_is_taken_by_the_losses_that_have_it_and_refused_by_all_others(name, key):
    value, names = OPTIONS[key]
    if name in names:
        assert getattr(loss(name, **{key: value}), key) == value
    else:
        with pytest.raises(ValueError, match=rf"^{key} is (not )?for .*{name}"):
            loss(name, **{key: value})


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_loss_without_its_number_is_refused(name):
    (key,) = NEEDED[name]
    with pytest.raises(ValueError, match=rf"^{key} must be given for name={name}$"):
        LossConfig(name=name)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LossConfig(beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: LossConfig(beta=float("nan")), "beta is nan; give a finite number"),
        (
            lambda: loss("cdpo", label_smoothing=0.5),
            "label_smoothing must be >= 0 and < 0.5 or null, got 0.5",
        ),
        (
            lambda: loss("robust", label_smoothing=-0.1),
            "label_smoothing must be >= 0 and < 0.5 or null, got -0.1",
        ),
        (lambda: loss("simpo", target_margin=-1.0), "target_margin must be >= 0"),
        (lambda: loss("orpo", odds_coef=0.0), "odds_coef must be > 0"),
        (lambda: loss("kto", desirable_weight=0.0), "desirable_weight must be > 0"),
        (lambda: loss("kto", undesirable_weight=-1.0), "undesirable_weight must be > 0"),
        (lambda: OffsetConfig(alpha=-1.0), "alpha must be >= 0"),
        (lambda: DrDPOConfig(beta_prime=0.0), "beta_prime must be > 0"),
        (lambda: TokenWeightsConfig(gamma=1.5), "gamma must be >= 0 and <= 1, got 1.5"),
        (
            lambda: LossConfig(divergence="alpha"),
            "divergence_alpha and divergence=alpha go together",
        ),
        (
            lambda: LossConfig(divergence_alpha=0.5),
            "divergence_alpha and divergence=alpha go together",
        ),
        (
            lambda: LossConfig(divergence="alpha", divergence_alpha=1.0),
            "divergence_alpha must be > 0 and < 1 or null, got 1.0",
        ),
        (
            lambda: LossConfig(divergence="js", token_weights=TokenWeightsConfig()),
            "token_weights does not go with divergence=js",
        ),
        (lambda: ReferenceConfig(sync_every=-1), "sync_every must be >= 0"),
        (
            lambda: ReferenceConfig(sync_every=1, sync_mix=0.0),
            "sync_mix must be > 0 and <= 1",
        ),
        (
            lambda: ReferenceConfig(sync_every=1, sync_mix=1.1),
            "sync_mix must be > 0 and <= 1",
        ),
        (
            lambda: ReferenceConfig(sync_mix=0.5),
            "sync_mix does nothing without sync_every",
        ),
        (
            lambda: ReferenceConfig(cache_dir="c", sync_every=5),
            "cache_dir keeps the log-probs of a",
        ),
    ],
)
def test_values_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()


FREE = [loss("simpo"), loss("orpo")]
LAST, INITIAL = CurriculumConfig(), CurriculumConfig(reference="initial")
CACHED, SYNCED = ReferenceConfig(cache_dir="c"), ReferenceConfig(sync_every=5)


@pytest.mark.parametrize(
    "keys, message",
    [
        *(
            ({"loss": free, "reference": ReferenceConfig(path="x")}, "reference does not apply to loss.name=")
            for free in FREE
        ),
        *(
            ({"loss": free, "reference": CACHED}, "has no reference policy; drop the section")
            for free in FREE
        ),
        *(
            ({"loss": free, "reference": SYNCED}, "has no reference policy; drop the section")
            for free in FREE
        ),
        ({"loss": loss("kto"), "reference": CACHED}, "reference.cache_dir is about pairs of responses"),
        ({"loss": loss("kto"), "share_prompts": False}, "share_prompts is about pairs of responses"),
        ({"loss": loss("kto"), "curriculum": LAST}, "curriculum is about pairs of responses"),
        (
            {"loss": loss("simpo"), "curriculum": CurriculumConfig(order="reference_gap")},
            "curriculum.order must not be reference_gap for loss.name=simpo, which has no reference",
        ),
        ({"curriculum": LAST, "reference": CACHED}, "or set curriculum.reference=initial"),
        (
            {"curriculum": LAST, "reference": SYNCED},
            "reference.sync_every and curriculum.reference=last both",
        ),
        (
            {"sample": SampleConfig(reward_functions={"accuracy": "a:b"})},
            "sample.reward_functions.accuracy is the name of another metric",
        ),
    ],
)
def test_sections_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PreferenceRecipe(**keys)


@pytest.mark.parametrize(
    "keys, view, moves",
    [
        ({}, "pairs", False),
        ({"reference": CACHED}, "pairs", False),
        ({"reference": SYNCED}, "pairs", True),
        ({"loss": loss("kto")}, "unpaired", False),
        ({"loss": loss("kto"), "reference": SYNCED}, "unpaired", True),
        ({"curriculum": LAST}, "ranked", True),
        ({"curriculum": CurriculumConfig(num_stages=1)}, "ranked", False),  # there is no later stage
        ({"curriculum": CurriculumConfig(num_stages=1), "reference": CACHED}, "ranked", False),
        ({"curriculum": INITIAL}, "ranked", False),
        ({"curriculum": INITIAL, "reference": CACHED}, "ranked", False),
        ({"curriculum": INITIAL, "reference": SYNCED}, "ranked", True),
        ({"curriculum": LAST, "loss": loss("simpo")}, "ranked", False),
    ],
)
def test_what_goes_together(keys, view, moves):
    recipe = PreferenceRecipe(**keys)
    assert (recipe.view, recipe.reference_moves) == (view, moves)


@pytest.mark.parametrize(
    "keys, adapter_off",
    [
        ({}, True),
        ({"reference": CACHED}, True),
        ({"reference": ReferenceConfig(path="elsewhere")}, False),
        ({"reference": SYNCED}, False),  # it moves away from the base weights
        ({"loss": loss("simpo")}, False),
    ],
)
def test_under_lora_the_reference_is_the_policy_without_adapter_unless_it_is_another(keys, adapter_off):
    lora = ModelConfig(path="x", lora=LoraConfig(r=4))
    assert PreferenceRecipe(model=lora, **keys).reference_is_adapter_off == adapter_off
    assert not PreferenceRecipe(model=ModelConfig(path="x"), **keys).reference_is_adapter_off
