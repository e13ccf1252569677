from __future__ import annotations

import json

import pytest
import torch
from offline_runs import SFT, run_offline
from online_runs import merged, run_online
from sampled import generate
from tiny_models import ARCHITECTURES, HYBRIDS, MORE, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.data.tasks.demo import DemoConfig
from drpo.models.inputs import model_inputs
from drpo.models.positions import check_examples, check_lengths, check_sampling, position_limit
from drpo.models.scalar_head import ScalarModel
from drpo.models.tokenizer import train_tokenizer
from drpo.rollout.sampler import SamplingConfig, draw_uniforms
from drpo.trainers import sft
from drpo.trainers.preference import train as preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.sft import SFTRecipe
from reward_models import train as reward_model

WITH_TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 16},
    "codegen": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": 16},
    "ctrl": {"n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 64, "n_positions": 16},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16},
    "opt": {**ARCHITECTURES["opt"], "max_position_embeddings": 16},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 16,
    },
    "biogpt": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("model_type", WITH_TABLES)
def test_the_limit_is_where_the_model_itself_fails(model_type):
    config = AutoConfig.for_model(model_type, vocab_size=61, **WITH_TABLES[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(model) == position_limit(model.base_model) == 16
    ids = torch.arange(17)[None] + 3
    assert model(input_ids=ids[:, :16]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize("model_type", sorted({*ARCHITECTURES, *MORE, *HYBRIDS} - {"gpt2", "opt"}))
def test_rotary_and_alibi_positions_have_no_end(model_type):
    model = tiny_model(model_type)
    assert position_limit(model) is None
    assert model(torch.arange(3, 80)[None] % 61).logits.isfinite().all(), "77 tokens, made for 64"


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_full_table_beside_padding_is_used_to_its_end(model_type):
    model = tiny_model(model_type)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :6] = False  # 64 tokens: all positions
    mask[1, :40] = False
    ids = torch.arange(70).repeat(2, 1) % 50
    logits = model(**model_inputs(model, ids, mask)).logits
    torch.testing.assert_close(logits[:1, 6:], model(ids[:1, 6:]).logits)
    mask[0, 5] = True
    for reader in (model, model.base_model):
        with pytest.raises(ConfigError, match="a text has 65 tokens, but .* has 64 positions"):
            model_inputs(reader, ids, mask)
    with pytest.raises(ConfigError, match="64 positions"):
        ScalarModel.from_causal_lm(model)(ids, mask)


def test_sampling_beyond_the_table_is_told_before_the_first_token():
    model, uniforms = tiny_model("gpt2"), draw_uniforms(0, [0, 1], 40)
    options = {"sampling": SamplingConfig(), "stop_ids": [], "batch_size": 1}
    assert len(generate(model, [[3] * 25], [40], uniforms[:1], **options)[0]) == 40  # the last one is not fed
    with pytest.raises(ConfigError, match="sampling: 1 of 2 texts .* the longest has 65 tokens"):
        generate(model, [[3] * 2, [3] * 26], [40, 40], uniforms, **options)


def test_examples_are_counted_with_their_longest_response():
    model = tiny_model("gpt2")
    pair = Example(Record("a"), [3] * 10, chosen_ids=[4] * 54, rejected_ids=[5] * 20)
    ranked = Example(Record("b"), [3] * 10, ranked_ids=[[4] * 3, [5] * 55])
    assert check_examples(model, [pair]) == []
    with pytest.raises(
        ConfigError, match="reference.path: 1 of 2 texts .* 64 positions of this gpt2 .* 65 tokens"
    ):
        check_examples(model, [pair, ranked], "reference.path")
    with pytest.raises(
        ConfigError, match="the longest has 66 tokens; .*lower rollout.max_response_length=56"
    ):
        check_sampling(model, [pair], 56, "model.path", "rollout.max_response_length")


def test_rotary_models_give_one_line_of_warning():
    model = tiny_model("llama")
    assert check_lengths(model, [3, 64], "model.path", "cut them") == []
    (note,) = check_lengths(ScalarModel.from_causal_lm(model), [65, 70, 3], "critic.path", "cut them")
    assert note.startswith("warning: critic.path: 2 of 3 texts") and "64 positions" in note
    assert check_lengths(tiny_model("bloom"), [10**6], "model.path", "") == []


# --- stages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folder with a GPT-2 of 64 positions and one of 32, and pairs of which one does not fit."""
    folder = tmp_path_factory.mktemp("positions")
    tokenizer = train_tokenizer(["Name a metal. Iron. Wood."] * 20, 300)
    for name, num_positions in (("gpt2", 64), ("short", 32)):
        tiny_model("gpt2", vocab_size=300, n_positions=num_positions).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"Name metal {i}.", "chosen": " Iron.", "rejected": " Wood."} for i in range(20)]
    (folder / "fitting.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows.append({"prompt": "Name a metal. " * 30, "chosen": " Iron.", "rejected": " Wood."})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def own(inputs, name="pairs.jsonl", **further):
    return {"data": {"task": "own", "path": str(inputs / name), "eval_fraction": 0.0, **further}}


def offline(recipe_class, train, inputs, run_dir, data, **changes):
    recipe = {name: part for name, part in SFT.items() if name not in ("data", "model", "sample")}
    given = {**data, "model": {"path": str(inputs / "gpt2")}, "eval": {"every": 0}}
    return run_offline(recipe_class, train, run_dir, merged(merged(recipe, given), changes))


STAGES = {
    "sft": (SFTRecipe, lambda recipe, engine: sft.train(recipe, engine, {})),
    "dpo": (PreferenceRecipe, lambda recipe, engine: preference.train(recipe, engine, {})),
    "reward_model": (reward_model.RewardModelRecipe, reward_model.train),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_text_without_room_is_told_before_training_and_a_limit_makes_it_a_bad_row(stage, inputs, tmp_path):
    no_samples = (
        {"score": {"num_references": 0}} if stage == "reward_model" else {"sample": {"num_prompts": 0}}
    )
    with pytest.raises(ConfigError, match="model.path: 1 of 21 texts .* data.max_prompt_length"):
        offline(*STAGES[stage], inputs, tmp_path / "long", own(inputs), **no_samples)
    limited = own(inputs, max_prompt_length=50, max_bad_fraction=0.1)
    _, rows = offline(*STAGES[stage], inputs, tmp_path / "limited", limited, **no_samples)
    assert len(rows) == 3


def test_references_and_samples_are_held_against_positions_too(inputs, tmp_path):
    changes = {"reference": {"path": str(inputs / "short")}, "sample": {"num_prompts": 0}}
    data = own(inputs, "fitting.jsonl")
    offline(*STAGES["dpo"], inputs, tmp_path / "fits", data, **changes)
    tiny_model("gpt2", vocab_size=300, n_positions=8).save_pretrained(inputs / "short")
    with pytest.raises(ConfigError, match="reference.path: 10 of 20 texts .* 8 positions"):
        offline(*STAGES["dpo"], inputs, tmp_path / "short", data, **changes)
    data = own(inputs, "fitting.jsonl", eval_fraction=0.3)
    with pytest.raises(ConfigError, match="model.path: .* lower sample.max_response_length=60"):
        offline(*STAGES["sft"], inputs, tmp_path / "samples", data, sample={"max_response_length": 60})


def test_online_runs_check_policy_critic_and_reward_model(inputs, tmp_path):
    data = {**own(inputs, "fitting.jsonl"), "reset": {"proportion": 0.0}}
    data["data"]["demo"] = {"num_train": DemoConfig().num_train, "num_eval": DemoConfig().num_eval}

    def run(name, length, reward_fn=lambda completions: [0.0] * len(completions), **changes):
        rollout = {"rollout": {"max_response_length": length}}
        run_online(inputs / "gpt2", tmp_path / name, merged(merged(data, rollout), changes), reward_fn)

    with pytest.raises(ConfigError, match="model.path: .* lower rollout.max_response_length=60"):
        run("policy", 60)
    critic = ScalarModel.from_causal_lm(tiny_model("gpt2", vocab_size=300, n_positions=32))
    critic.save_pretrained(tmp_path / "critic")
    AutoTokenizer.from_pretrained(inputs / "gpt2").save_pretrained(tmp_path / "critic")
    with pytest.raises(ConfigError, match="critic.path: .* 32 positions of this gpt2"):
        run("critic_run", 30, critic={"path": str(tmp_path / "critic")})

    class Bounded:
        max_tokens = 32

        def __call__(self, completions):
            return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="reward.function: .* the reward model has 32 positions"):
        run("reward", 30, Bounded())
