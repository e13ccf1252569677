"""Every defect found in TRL's PPO and DPO trainers (1.10) has a test that fails on that behaviour.

Those of PPO that need a whole run are below, numbered, those of DPO in test_peers_dpo; `ELSEWHERE` says where the
others are.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from drpo.run.metrics import reproducible

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = {
    "1 num_mini_batches does nothing": (
        "drpo/trainers/test_ppo_update",
        "test_exactly_epochs_times_minibatches_steps_on_different_minibatches",
    ),
    "2 statistics diluted by the number of minibatches": (
        "drpo/trainers/test_ppo_update",
        "test_statistics_are_plain_means_over_minibatches_of_token_means",
    ),
    "4 max_grad_norm ignored": ("drpo/trainers/test_ppo_update", "test_max_grad_norm_clips_for_real"),
    "8 entropy biased by padding, unmasked statistics": (
        "drpo/trainers/test_online_metrics",
        "test_entropy_is_the_mean_over_policy_tokens_alone",
    ),
    "10 whitening per process": (
        "drpo/trainers/test_credit",
        "test_advantages_are_whitened_over_the_counted_tokens",
    ),
    "10 token weights depend on the micro-batch": (
        "drpo/trainers/test_ppo_update",
        "test_the_result_does_not_depend_on_the_microbatch_size",
    ),
    "DPO: options that a loss has not are ignored (label smoothing, divergences)": (
        "drpo/trainers/preference/test_recipe",
        "test_an_option_is_taken_by_the_losses_that_have_it_and_refused_by_all_others",
    ),
    "DPO: the robust loss at label smoothing 0.5 is -inf": (
        "drpo/trainers/preference/test_recipe",
        "test_values_are_checked",
    ),
    "DPO: no offsets, no token weights, cDPO is missing": (
        "drpo/trainers/preference/test_pair_objective",
        "test_losses_and_gradients_are_those_of_a_loop_over_pairs_and_tokens",
    ),
    "DPO: the margins of the data are dropped": (
        "drpo/trainers/preference/test_train",
        "test_the_scores_of_pairs_become_offsets_in_training_and_not_in_the_evaluation",
    ),
    "DPO: sums in the cache of the reference": (
        "drpo/trainers/preference/test_reference_cache",
        "test_tokens_may_be_weighted_afterwards",
    ),
    "DPO: no moving reference with adapters": (
        "drpo/trainers/preference/test_reference",
        "test_a_reference_that_follows_at_once_makes_every_step_the_first",
    ),
    "DPO: no test of resuming": (
        "drpo/trainers/preference/test_train",
        "test_a_resumed_run_is_the_run_that_was_not_stopped_bit_for_bit",
    ),
}


@pytest.mark.parametrize("defect", ELSEWHERE)
def test_the_tests_named_above_exist(defect):
    file, function = ELSEWHERE[defect]
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


class Watch:
    """Forwards of all modules of a class, with gradients on (training) and off (rollouts, measuring)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.calls: Counter[bool] = Counter()
        self.dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def __enter__(self) -> Watch:
        modules = nn.modules.module
        self._hooks = (
            modules.register_module_forward_pre_hook(self._begins),  # a recomputed forward does not end
            modules.register_module_forward_hook(self._ends),
        )
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begins(self, module: nn.Module, args: tuple) -> None:
        if type(module).__name__ == self.kind:
            self.calls[torch.is_grad_enabled()] += 1

    def _ends(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if type(module).__name__ != self.kind:
            return
        of_a_probe = bool(args) and len(args[0]) <= 2  # two tiny rows, in float32 when a model is loaded
        if not of_a_probe:
            first = output[0] if isinstance(output, tuple) else output
            self.dtypes[torch.is_grad_enabled()].add(first.dtype)


# --- 3: an optimizer step for each micro-batch at the end of the data -------------------------------------


def test_3_every_update_takes_the_same_number_of_optimizer_steps(online_run):
    """24 prompts in batches of 16: a pass over the data ends inside the second batch, and at its end in the third."""
    rows, _ = online_run(num_steps=4)
    assert [row["ppo/num_optimizer_steps"] for row in rows] == [4.0] * 4


# --- 5: gradient_checkpointing accepted, never applied ----------------------------------------------------


def test_5_gradient_checkpointing_is_on_for_policy_and_critic(online_run):
    """Each layer runs twice for a backward pass, and nothing else changes."""
    results, calls = [], []
    for on in (False, True):
        with Watch("GPTNeoXLayer") as layers:
            results.append(online_run(num_steps=2, model={"gradient_checkpointing": on})[0])
        calls.append(layers.calls)
    steps, microbatches, layers_of_both_models = 2 * 4, 2, 2 * 2
    assert calls[0][True] == steps * microbatches * layers_of_both_models
    assert calls[1][True] == 2 * calls[0][True]
    assert calls[1][False] == calls[0][False]  # rollouts keep their cache
    for off, on in zip(*results, strict=True):
        assert reproducible(on) == pytest.approx(reproducible(off), rel=1e-3, abs=1e-4)


# --- 6: bf16 accepted, never applied ----------------------------------------------------------------------


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_6_mixed_precision_is_that_of_the_recipe(online_run, precision, dtype):
    with Watch("GPTNeoXMLP") as linear:
        _, folder = online_run(num_steps=1, engine={"mixed_precision": precision})
    assert linear.dtypes == {True: {dtype}, False: {dtype}}  # in training, and in rollouts and measuring
    config = json.loads((folder / "policy" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"  # the weights stay float32


# --- 7: ratio != 1 before the first step under autocast ---------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("microbatch_size", [4, 3])
def test_7_the_ratio_is_one_before_the_first_optimizer_step(online_run, precision, microbatch_size):
    """With one optimizer step an update, each statistic is of the weights that sampled."""
    rows, _ = online_run(
        engine={"mixed_precision": precision},
        ppo={"num_epochs": 1, "num_minibatches": 1, "microbatch_size": microbatch_size},
    )
    for row in rows:
        assert row["ppo/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row["ppo/approx_kl"] < 1e-8
        assert row["ppo/clip_fraction"] == 0.0
    assert rows[-1]["objective/kl_k3"] > 1e-4  # and the policy did move


# --- 9: unseeded shuffles ---------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def test_9_the_same_seed_gives_the_same_run_bit_for_bit(online_run):
    results = []
    for noise in (0, 1):
        np.random.seed(noise)
        torch.manual_seed(noise)
        results.append(online_run(seed=5))
    (first, first_folder), (second, second_folder) = results
    assert [reproducible(row) for row in first] == [reproducible(row) for row in second]
    left, right = weights(first_folder), weights(second_folder)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    other, _ = online_run(seed=6)
    assert reproducible(other[0]) != reproducible(first[0])


# --- 11: logging, evaluation and saving settings half honoured --------------------------------------------


def steps_with(rows: list[dict], prefix: str) -> list[int]:
    return [row["step"] for row in rows if any(key.startswith(prefix) for key in row)]


def test_11_evaluation_logging_samples_and_checkpoints_come_when_asked_for(online_run, capsys):
    rows, folder = online_run(
        num_steps=5,
        eval={"every": 2, "num_prompts": 4},
        log={"every": 3, "samples_every": 4},
        checkpoint={"every": 2, "keep": 2},
    )
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]  # metrics of every step, 0 is before training
    assert steps_with(rows, "eval/") == [0, 2, 4, 5]  # every second one, and at the end
    assert steps_with(rows, "ppo/") == [1, 2, 3, 4, 5]
    shown = re.findall(r"^step (\d+):", capsys.readouterr().out, flags=re.M)
    assert [int(step) for step in shown] == [0, 1, 3]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    steps = {kind: {s["step"] for s in samples if s["split"] == kind} for kind in ("rollout", "eval")}
    assert steps == {"rollout": {1, 4}, "eval": {0, 2, 4, 5}}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_4", "step_5"}


def test_11_nothing_comes_when_it_is_off(online_run):
    rows, folder = online_run(num_steps=2)
    assert steps_with(rows, "eval/") == []
    assert not (folder / "samples.jsonl").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_2"]  # the end is always saved


def test_4_and_11_a_tiny_max_grad_norm_keeps_the_policy_where_it_is(online_run):
    """AdamW moves by lr g / (|g| + eps): with |g| <= 1e-12 and eps = 1e-5 the weights stand still."""
    rows, folder = online_run(optim={"max_grad_norm": 1e-12})
    assert all(row["ppo/grad_norm"] > 1e-3 for row in rows)  # reported before clipping
    assert all(abs(row["objective/kl_k3"]) < 1e-6 for row in rows)


# --- 12: the documented total is not the computed one -----------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_12_the_total_is_the_score_minus_the_weighted_kl(online_run, estimator):
    rows, _ = online_run(kl={"coef": 0.3, "estimator": estimator}, ppo={"num_epochs": 4})
    for row in rows:
        expected = row["objective/shaped_score"] - row["objective/kl_coef"] * row[f"objective/kl_{estimator}"]
        assert row["objective/total"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert abs(rows[-1]["objective/kl_k1"]) > 1e-3  # else the sign could not be seen
    assert "`objective/total` | shaped score - kl_coef * KL of the reward" in metrics_page()


def metrics_page() -> str:
    page = (ROOT / "docs" / "algorithms" / "drpo.md").read_text(encoding="utf-8")
    return page.partition("## Metrics")[2].partition("\n## ")[0]


def test_12_every_metric_of_a_run_is_explained(online_run):
    rows, _ = online_run(eval={"every": 2, "num_prompts": 4}, kl={"target_per_token": 1.0})
    table = [line for line in metrics_page().splitlines() if line.startswith("| `")]
    documented = [set(re.findall(r"`([^`]+)`", line)) for line in table]

    def explained(key: str) -> bool:
        group, _, name = key.partition("/")
        group = "prefix_<low>_<high>" if group.startswith("prefix_") else group
        for names in documented:
            about_group = any(entry.startswith(group + "/") for entry in names)
            if f"{group}/{name}" in names or f"{group}/*" in names or (about_group and name in names):
                return True
            if f"{group}/*_learning_rate" in names and name.endswith("_learning_rate"):
                return True
        return False

    keys = {key for row in rows for key in row} - {"step"}
    assert not [key for key in sorted(keys) if not explained(key)]
