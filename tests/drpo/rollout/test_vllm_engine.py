"""vLLM as rollout engine: what is decided without it. Real runs of it are in tests/end_to_end/test_vllm.py."""

from __future__ import annotations

import importlib.util

import pytest
import yaml
from online_runs import RECIPE, merged
from transformers import GPTNeoXConfig, LlamaConfig

from drpo.config import ConfigError, load_recipe
from drpo.rollout.vllm_engine import kv_cache_bytes
from drpo.rollout.vllm_requests import check_agreement, check_installed, request_seed
from drpo.trainers.online_recipe import OnlineRecipe

VLLM = {"rollout": {"engine": "vllm"}}


def load(tmp_path, changes: dict) -> OnlineRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(RECIPE, changes)))
    return load_recipe(OnlineRecipe, path, [])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout": {"vllm": {"enforce_eager": True}}}, "^.*rollout.vllm does not apply to rollout.engine=native"),
        ({"ppo": {"importance_sampling": "token"}}, "ppo.importance_sampling is for rollout.engine=vllm"),
        ({**VLLM, "ppo": {"importance_cap": 3.0}}, "ppo.importance_cap does not apply to ppo.importance_sampling=none"),
        (
            {**VLLM, "ppo": {"importance_sampling": "token", "importance_cap": 0.5}},
            "ppo.importance_cap must be >= 1",
        ),
        ({**VLLM, "eval": {"every": 1, "temperature": 0.001}}, r"eval.temperature \(0.001\) must be 0 or >= 0.01"),
        (
            {"rollout": {"engine": "vllm", "sampling": {"temperature": 0.005}}},
            r"rollout.sampling.temperature \(0.005\) must be 0 or >= 0.01",
        ),
        ({"rollout": {"engine": "vllm", "vllm": {"kv_cache_gib": 0}}}, "rollout.vllm.kv_cache_gib must be > 0"),
        ({"rollout": {"engine": "sglang"}}, "rollout.engine"),
    ],
)  # fmt: skip
def test_settings_that_do_not_apply_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, changes)


def test_settings_that_apply_are_taken(tmp_path):
    recipe = load(tmp_path, {**VLLM, "ppo": {"importance_sampling": "sequence", "importance_cap": 3.0}})
    assert recipe.rollout.engine == "vllm" and recipe.ppo.importance_cap == 3.0
    native = load(tmp_path, {"eval": {"every": 1, "temperature": 0.001}})  # it can
    without_eval = load(tmp_path, {**VLLM, "eval": {"every": 0, "temperature": 0.001}})
    assert native.eval.temperature == without_eval.eval.temperature == 0.001


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_a_run_is_refused_before_models_are_loaded(online_run):
    message = r"rollout.engine=vllm needs the package vllm: pip install -e '.\[vllm\]'"
    with pytest.raises(ConfigError, match=message):
        check_installed()
    with pytest.raises(ConfigError, match=message):
        online_run(**VLLM)


def test_the_cache_holds_the_rows_of_a_batch_in_whole_blocks():
    # Llama: 2 layers x (keys, values) x 2 heads x 8 wide = 64 numbers a position; 130 tokens take 2 blocks of 128.
    grouped = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    assert kv_cache_bytes(grouped, 3, 130, 2) == (3 * 2 + 1) * 128 * 64 * 2
    # GPT-NeoX: 3 layers x 2 x 4 heads x 16 wide = 384.
    plain = GPTNeoXConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    assert kv_cache_bytes(plain, 1, 128, 4) == 2 * 128 * 384 * 4


def test_seeds_of_requests_are_apart_and_fit_in_63_bits():
    seeds = {(seed, number): request_seed(seed, number) for seed in range(20) for number in range(50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())
    assert max(seeds.values()) > 2**62 and seeds[3, 4] == request_seed(3, 4)


@pytest.mark.parametrize("difference, fails", [(0.015, False), (0.6, True), (float("nan"), True)])
def test_an_engine_that_computes_another_model_is_refused(difference, fails):
    if not fails:
        check_agreement(difference)
        return
    with pytest.raises(
        ConfigError, match="rollout.engine=vllm: log-probabilities.*use rollout.engine=native"
    ):
        check_agreement(difference)
