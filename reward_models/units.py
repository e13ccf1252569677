"""Whether the scores of several reward models can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from drpo.config import ConfigError
from reward_models.model import RewardModelConfig


def check_units(configs: Sequence[RewardModelConfig], paths: Sequence[str], how: str, place: str) -> None:
    """Raise ConfigError, naming `place`, unless the scores of an ensemble's members can be compared.

    All must have been given a zero on references or none, and a unit; other than how="mean" needs a zero.
    """
    for what, remedy in (("centre", "score.num_references above 0"), ("scale", "score.unit_variance=true")):
        has_own = [config.was_given(what) for config in configs]
        if any(has_own) and not all(has_own):
            with_it, without = paths[has_own.index(True)], paths[has_own.index(False)]
            raise ConfigError(
                f"{place}: {with_it!r} was given a {what} on references and {without!r} was not, so their scores "
                f"cannot be compared; train all members with {remedy}, or none"
            )
    if len(configs) > 1 and how != "mean" and not configs[0].was_given("centre"):
        raise ConfigError(
            f"{place}: the scores of these models have no zero of their own (a Bradley-Terry model is fixed up to a "
            f"constant), so combine={how} compares constants; train them with score.num_references above 0, or take "
            "combine=mean"
        )
