"""Recipes of ways to reset and of estimators: the demo's DR-PO with what is their papers' own, and no more."""

from __future__ import annotations

import pytest
from shipped_recipes import differing, loaded

from drpo.run.folder import flatten

WITHOUT_CRITIC = {"ppo.value_coef": 0.1}  # the default: nothing reads it
GROUPS = WITHOUT_CRITIC | {
    "rollout.rollouts_per_prompt": 4,
    "reset.per": "prompt",
    "ppo.loss_normalisation": "constant",
    "advantage.whiten": False,
}
DR_GRPO = GROUPS | {"advantage.estimator": "grpo", "advantage.group_std": False}
OWN = {
    "ppo": {"reset.proportion": 0.0},
    "ppo_pp": {"reset.source": "initial"},
    "drpo_annealed": {"reset.length_schedule": "cosine", "reset.schedule_end": 0.75},
    "drpo_adaptive": {"reset.length": "adaptive"},
    "drpo_likelihood": {"reset.sft_coef": 1.0},
    "drpo_own": {"reset.source": "own", "reset.proportion": 0.5, "reset.own.size": 512},
    "drpo_rloo": GROUPS | {"advantage.estimator": "rloo"},
    "drpo_grpo": GROUPS | {"advantage.estimator": "grpo", "ppo.loss_normalisation": "sequence"},
    "rloo": GROUPS | {"advantage.estimator": "rloo", "reset.proportion": 0.0, "reset.per": "rollout"},
    "grpo": GROUPS
    | {
        "advantage.estimator": "grpo",
        "ppo.loss_normalisation": "sequence",
        "reset.proportion": 0.0,
        "reset.per": "rollout",
    },
    "reinforce_pp": WITHOUT_CRITIC | {"advantage.estimator": "reinforce_pp", "reset.proportion": 0.0},
    "bread": DR_GRPO
    | {"reset.length": "adaptive", "reset.adaptive.success": 0.25, "reset.adaptive.start": 0.0},
    "uft": DR_GRPO
    | {
        "reset.length": "binomial",
        "reset.length_schedule": "cosine",
        "reset.schedule_end": 0.6,
        "reset.max_fraction": 0.95,
        "reset.min_fraction": 0.05,
        "reset.sft_coef": 1.0,
    },
    "prefix_rft": DR_GRPO
    | {
        "reset.proportion": 0.25,
        "reset.per": "rollout",
        "reset.length": "curriculum",
        "reset.curriculum_end": 1.0,
        "reset.min_fraction": 0.05,
        "reset.max_fraction": 0.95,
        "reset.sft_coef": 1.0,
    },
    "prefix_rl": DR_GRPO | {"reset.proportion": 0.5, "reset.min_fraction": 0.3},
    "rrpo": DR_GRPO
    | {
        "reset.source": "own",
        "reset.proportion": 0.5,
        "reset.own.which": "worst",
        "reset.own.size": 128,  # the rollouts of the last step
    },
    "vineppo": WITHOUT_CRITIC
    | {"advantage.estimator": "vine", "reset.proportion": 0.0, "vine.num_rollouts": 4, "vine.every": 2},
    "vapo": {
        "advantage.value_lam": 1.0,
        "advantage.length_adaptive_alpha": 1.0,
        "ppo.clip_range_high": 0.28,
        "critic.pretrain_steps": 4,
    },
}


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_differs_from_drpo_in_what_its_paper_has_of_its_own(name):
    settings = flatten(loaded(f"demo/{name}.yaml"))
    of_drpo = flatten(loaded("demo/drpo.yaml"))
    assert differing("demo/drpo.yaml", f"demo/{name}.yaml") - {"run_dir"} == {
        key for key, value in OWN[name].items() if value != of_drpo[key]
    }
    assert {key: settings[key] for key in OWN[name]} == OWN[name]
