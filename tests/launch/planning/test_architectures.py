"""Architectures by path: a local config, what a shipped recipe will write, and the known models of the hub."""

from __future__ import annotations

import pytest
import torch
import yaml
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from drpo.config import ConfigError
from drpo.models.scalar_head import ScalarModel
from launch.planning.architectures import KNOWN, architecture_of

# Parameters of the hub's safetensors files, from the model pages; tied output embeddings count once.
PARAMETERS = {
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "EleutherAI/pythia-2.8b-deduped": 2_775_208_960,
    "EleutherAI/pythia-6.9b-deduped": 6_857_302_016,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
}


def test_every_known_model_has_a_published_count():
    assert yaml.safe_load(KNOWN.read_text()).keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("path", "count"), PARAMETERS.items())
def test_known_model_has_the_published_number_of_parameters(path, count):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture_of(path, "model.path"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_local_folder_needs_only_its_config(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    assert architecture_of(str(tmp_path), "model.path").hidden_size == 32


def test_scalar_model_has_the_architecture_of_its_backbone(tmp_path):
    ScalarModel.from_causal_lm(tiny_model("qwen3")).config.save_pretrained(tmp_path)
    assert architecture_of(str(tmp_path), "critic.path").model_type == "qwen3"


@pytest.mark.parametrize("path", ["runs/tldr/sft_2.8b/policy", "runs/tldr/reward_model_2.8b/reward_model"])
def test_what_a_shipped_recipe_will_write_is_known_before_it_runs(path):
    architecture = architecture_of(path, "model.path")
    assert (architecture.model_type, architecture.hidden_size, architecture.num_hidden_layers) == (
        "gpt_neox",
        2560,
        32,
    )


def test_policy_from_scratch_has_the_vocabulary_of_its_recipe(tmp_path, monkeypatch):
    """launch/recipes/demo/sft.yaml, which nobody has run here."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((KNOWN.parents[1] / "recipes" / "demo" / "sft.yaml").read_text())["model"]
    architecture = architecture_of("runs/demo/sft/policy", "model.path")
    assert architecture.vocab_size == settings["vocab_size"]
    assert architecture.hidden_size == settings["architecture"]["hidden_size"]


def test_unknown_model_is_refused_with_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model.path: .* its config.json is enough"):
        architecture_of("somebody/unknown-model", "model.path")
    with pytest.raises(ConfigError, match=r"reward.path: no folder .* its config.json is enough"):
        architecture_of(str(tmp_path / "nothing"), "reward.path")
