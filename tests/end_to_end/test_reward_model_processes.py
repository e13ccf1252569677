"""A reward model of several processes is that of one: rankings, adapters, language-model loss, zero and unit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    PREFERENCE,
    SFT,
    assert_close,
    ddp,
    deepspeed,
    metrics_of,
    partitioned,
    plain,
    run,
    write_recipe,
)

from reward_models.model import RewardModelConfig

RECIPE = {name: part for name, part in PREFERENCE.items() if name != "sample"} | {
    "loss": {"by": "prompt", "label_smoothing": 0.1},
    "score": {"unit_variance": True, "penalty": 0.01},
}
LAUNCHERS = [
    "two",
    pytest.param("zero2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=pytest.mark.slow),
    pytest.param("cut", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    run(plain("sft"), "sft.yaml", cwd=folder)
    return folder


def launcher_of(name: str, folder: Path) -> list[str]:
    match name:
        case "two":
            return ddp("reward_model")
        case "cut":
            return partitioned("reward_model", folder)
    return deepspeed("reward_model", int(name.removeprefix("zero")))


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("lm", {"loss": {**RECIPE["loss"], "lm_coef": 0.2}}),
        ("lora", {"model": {"path": "sft/policy", "lora": {"r": 2, "alpha": 4.0}}}),
    ],
)
def test_processes_make_the_reward_model_of_one(folder, launcher, kind, settings):
    recipe = write_recipe(folder / f"{kind}.yaml", {**RECIPE, **settings})
    alone = folder / f"{kind}_alone"
    if not alone.exists():
        run(plain("reward_model"), recipe.name, f"run_dir={alone.name}", cwd=folder)
    name = f"{kind}_{launcher}"
    run(launcher_of(launcher, folder), recipe.name, f"run_dir={name}", "batch.microbatch_size=2", cwd=folder)
    assert_close(metrics_of(alone), metrics_of(folder / name), 2e-4)
    weights, expected = (load_file(f / "reward_model" / "model.safetensors") for f in (folder / name, alone))
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=2e-4, msg=key)
    found, config = (RewardModelConfig.from_pretrained(f / "reward_model") for f in (folder / name, alone))
    assert found.centre == pytest.approx(config.centre, abs=1e-3)
    assert found.scale == pytest.approx(config.scale, rel=1e-3) and found.scale != 1
