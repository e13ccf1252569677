"""The reference policy: which one, how it moves, what it costs, and that an adapter switched off is a frozen copy."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from online_runs import forget_precision
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.models.adapters import add_lora
from drpo.models.loading import LoraConfig, ModelConfig, load_policy
from drpo.models.tokenizer import load_tokenizer
from drpo.trainers.preference.recipe import PreferenceRecipe, ReferenceConfig
from drpo.trainers.preference.reference import starting_reference
from drpo.trainers.reference import AdapterOff, FrozenCopy

LOG_2 = pytest.approx(0.6931472, abs=1e-6)  # the DPO loss of a policy that is its own reference


# --- moving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.25, 1.0])
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "bloom"])  # the last two have tied embeddings
def test_the_reference_moves_by_the_share_given(model_type, mix):
    policy, reference = tiny_model(model_type, seed=0), tiny_model(model_type, seed=1)
    before, target = copy.deepcopy(reference.state_dict()), copy.deepcopy(policy.state_dict())
    if model_type != "gpt_neox":
        assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    FrozenCopy(reference).move_towards(policy, mix)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, (1 - mix) * before[name] + mix * target[name], rtol=0, atol=1e-6)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, target[name])


def test_it_moves_towards_the_base_weights_with_the_adapter_folded_in():
    policy, reference = tiny_model("gpt_neox", seed=0), tiny_model("gpt_neox", seed=1)
    base, before = copy.deepcopy(policy.state_dict()), copy.deepcopy(reference.state_dict())
    adapted = add_lora(policy, r=2, alpha=6.0, target_modules=["dense_h_to_4h"], seed=0)
    generator = torch.Generator().manual_seed(0)
    folded = dict(base)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        parts = dict(adapted.named_parameters())
        for name in base:
            if name.endswith("dense_h_to_4h.weight"):
                a, b = (parts[f"base_model.model.{name[:-7]}.lora_{part}.default.weight"] for part in "AB")
                folded[name] = base[name] + 6.0 / 2 * b @ a
    FrozenCopy(reference).move_towards(adapted, 0.5)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, (before[name] + folded[name]) / 2, rtol=0, atol=1e-5)


# --- which one --------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    forget_precision()
    yield Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    forget_precision()


def started(engine: Engine, policy_folder: Path, model: dict, reference: dict):
    model_config = ModelConfig(path=str(policy_folder), **model)
    recipe = PreferenceRecipe(model=model_config, reference=ReferenceConfig(**reference))
    tokenizer = load_tokenizer(str(policy_folder))
    policy = load_policy(model_config, tokenizer)
    return policy, starting_reference(recipe, engine, tokenizer, policy)


def test_a_copy_is_frozen_another_object_and_the_same_weights(engine, policy_folder):
    policy, reference = started(engine, policy_folder, {}, {})
    assert isinstance(reference, FrozenCopy) and reference.module is not policy
    assert not reference.module.training and not any(p.requires_grad for p in reference.module.parameters())
    assert any(parameter.requires_grad for parameter in policy.parameters())
    for left, right in zip(policy.parameters(), reference.module.parameters(), strict=True):
        assert torch.equal(left, right) and left.data_ptr() != right.data_ptr()


def test_a_reference_that_takes_small_steps_is_float32_whatever_the_policy(engine, policy_folder):
    """1 + 2^-9 is 1 in bfloat16: a reference kept in it would stand still."""
    dtypes = {}
    for mix in (1.0, 0.01):
        sync = {"sync_every": 1, "sync_mix": mix}
        _, reference = started(engine, policy_folder, {"dtype": "bfloat16"}, sync)
        dtypes[mix] = {parameter.dtype for parameter in reference.module.parameters()}
    assert dtypes == {1.0: {torch.bfloat16}, 0.01: {torch.float32}}


def test_under_lora_no_copy_is_made_unless_it_must_move(engine, policy_folder):
    lora = {"lora": LoraConfig(r=4)}
    assert isinstance(started(engine, policy_folder, lora, {})[1], AdapterOff)
    _, moving = started(engine, policy_folder, lora, {"sync_every": 1})
    assert isinstance(moving, FrozenCopy)
    assert not [name for name in moving.module.state_dict() if "lora" in name]


@pytest.mark.parametrize("path", ["./none", "classifier"])
def test_a_path_without_a_policy_is_named_by_its_key(engine, policy_folder, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text(
        '{"architectures": ["GPT2ForSequenceClassification"]}'
    )
    with pytest.raises(ConfigError, match="^reference.path: "):
        started(engine, policy_folder, {}, {"path": path})


# --- in whole runs ----------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch) -> Counter:
    """How many models are made."""
    made: Counter[str] = Counter()
    make = GPTNeoXForCausalLM.__init__

    def counting(self, *args, **kwargs) -> None:
        made["models"] += 1
        make(self, *args, **kwargs)

    monkeypatch.setattr(GPTNeoXForCausalLM, "__init__", counting)
    return made


LORA = {"lora": {"r": 4, "alpha": 32.0}}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 2),
        ({"loss": {"name": "kto"}}, 2),
        ({"loss": {"name": "simpo", "target_margin": 0.5}}, 1),
        ({"loss": {"name": "orpo", "odds_coef": 0.5}}, 1),
        ({"loss": {"name": "simpo", "target_margin": 0.5}, "curriculum": {"num_stages": 2}}, 1),
        ({"model": LORA}, 1),
        ({"model": LORA, "loss": {"name": "kto"}}, 1),
        ({"model": LORA, "reference": {"sync_every": 1}}, 2),
    ],
)
def test_a_second_model_is_loaded_only_where_one_is_needed(preference_run, loaded, changes, expected):
    preference_run(num_steps=1, eval={"every": 0}, **changes)
    assert loaded["models"] == expected


@pytest.mark.parametrize("loss", [{"name": "dpo"}, {"name": "kto"}, {"name": "dpo", "dr_dpo": {}}])
def test_an_adapter_switched_off_is_a_frozen_copy_of_the_base(preference_run, policy_folder, loss):
    sample = {"num_prompts": 3, "max_response_length": 5}
    common = {"loss": loss, "model": LORA, "num_steps": 2, "eval": {"every": 2}, "sample": sample}
    off, _ = preference_run(**common)
    copied, _ = preference_run(**common, reference={"path": str(policy_folder)})
    for left, right in zip(off, copied, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)
    assert "eval/kl" in off[-1] and off[-1]["train/loss"] != off[0]["train/loss"]


@pytest.mark.parametrize("model", [{}, LORA], ids=["all weights", "LoRA"])
def test_a_reference_that_follows_at_once_makes_every_step_the_first(preference_run, model):
    rows, _ = preference_run(num_steps=3, model=model, eval={"every": 0}, reference={"sync_every": 1})
    assert [row["train/loss"] for row in rows] == [LOG_2] * 3
    assert [row["train/implicit_kl"] for row in rows] == pytest.approx([0] * 3, abs=1e-4)
    rows, _ = preference_run(num_steps=5, model=model, eval={"every": 0}, reference={"sync_every": 2})
    at_rest = [row["train/loss"] == LOG_2 for row in rows]
    assert at_rest == [True, False, True, False, True]


def test_a_soft_reference_is_the_running_mix_of_the_policies(preference_run, policy_folder):
    _, folder = preference_run(
        num_steps=4,
        eval={"every": 0},
        reference={"sync_every": 2, "sync_mix": 0.25},
        checkpoint={"every": 1, "keep": 9},
    )
    start = AutoModelForCausalLM.from_pretrained(policy_folder)
    expected = copy.deepcopy(start.state_dict())
    for step in (1, 2, 3, 4):
        checkpoint = folder / "checkpoints" / f"step_{step}"
        policy = load_file(checkpoint / "model.safetensors")
        if step % 2 == 0:
            expected = {name: 0.75 * old + 0.25 * policy[f"model.{name}"] for name, old in expected.items()}
        kept = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
        assert kept.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(kept[name], tensor, rtol=0, atol=1e-6, msg=f"step {step}: {name}")


def test_the_reference_may_be_another_policy(preference_run, policy_folder, tmp_path):
    """Then the first loss is not log 2, and the KL of the samples is to that policy."""
    _, other = preference_run(num_steps=3, eval={"every": 0})
    settings = {"num_steps": 1, "eval": {"every": 1}, "sample": {"num_prompts": 4, "max_response_length": 5}}
    rows, _ = preference_run(**settings, reference={"path": str(other / "policy")})
    assert rows[0]["train/loss"] != LOG_2
    same, _ = preference_run(**settings, reference={"path": str(policy_folder)})
    default, _ = preference_run(**settings)
    assert same == default and same[0]["train/loss"] == LOG_2
    assert rows[0]["eval/kl"] != same[0]["eval/kl"]
