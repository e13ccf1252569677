"""Settings that must not change the result: micro-batches, processes, DeepSpeed stages, PPO as DR-PO without resets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ONLINE,
    SFT,
    assert_close,
    ddp,
    deepspeed,
    metrics_of,
    plain,
    run,
    write_recipe,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an SFT policy, a DR-PO recipe, and its run by one process with whole minibatches."""
    folder = tmp_path_factory.mktemp("invariance")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    write_recipe(folder / "drpo.yaml", {**ONLINE, "model": {"path": "sft/policy"}})
    run(plain("sft"), "sft.yaml", cwd=folder)
    run(plain("drpo"), "drpo.yaml", "run_dir=whole", cwd=folder)
    return folder


def assert_same_policy(left: Path, right: Path, tolerance: float) -> None:
    a, b = (load_file(path / "policy" / "model.safetensors") for path in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def test_the_run_learns_something_to_be_invariant_about(folder):
    before, after = (load_file(folder / run / "policy" / "model.safetensors") for run in ("sft", "whole"))
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-3
    rows = metrics_of(folder / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(
        row["ppo/num_optimizer_steps"] == 4 for row in rows[1:]
    )  # 2 epochs x 2 minibatches, the last too
    assert any(row["reset/share"] > 0 for row in rows[1:])


def test_eight_accumulated_microbatches_equal_one(folder):
    run(plain("drpo"), "drpo.yaml", "run_dir=accumulated", "ppo.microbatch_size=1", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "accumulated"), 2e-4)
    assert_same_policy(folder / "whole", folder / "accumulated", 2e-4)


def test_two_processes_equal_one(folder):
    run(ddp("drpo"), "drpo.yaml", "run_dir=two", "ppo.microbatch_size=4", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / "two"), 2e-4)
    assert_same_policy(folder / "whole", folder / "two", 2e-4)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_deepspeed_processes_equal_one(folder, stage):
    run(deepspeed("drpo", stage), "drpo.yaml", f"run_dir=zero{stage}", "ppo.microbatch_size=2", cwd=folder)
    assert_close(metrics_of(folder / "whole"), metrics_of(folder / f"zero{stage}"), 2e-4)
    assert_same_policy(folder / "whole", folder / f"zero{stage}", 2e-4)


def test_ppo_is_drpo_without_resets_bit_for_bit(folder):
    run(plain("drpo"), "drpo.yaml", "run_dir=beta0", "reset.proportion=0", cwd=folder)
    run(plain("ppo"), "drpo.yaml", "run_dir=ppo", cwd=folder)
    beta_zero, ppo = metrics_of(folder / "beta0"), metrics_of(folder / "ppo")
    assert beta_zero == ppo
    assert all(row["reset/share"] == 0 for row in ppo[1:])
    assert_same_policy(folder / "beta0", folder / "ppo", 0.0)


def test_two_processes_train_the_same_sft_policy(folder):
    run(ddp("sft"), "sft.yaml", "run_dir=sft_two", "batch.microbatch_size=1", cwd=folder)
    assert_close(metrics_of(folder / "sft"), metrics_of(folder / "sft_two"), 1e-4)
    assert_same_policy(folder / "sft", folder / "sft_two", 1e-4)
