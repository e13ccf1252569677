from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import torch
from omegaconf import OmegaConf
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from drpo.config import ConfigError, load_recipe
from drpo.config_help import options
from drpo.models.export import save_policy
from drpo.models.loading import LoraConfig, ModelConfig, disable_dropout, load_critic, load_policy
from drpo.models.scalar_head import ScalarModel
from drpo.models.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["a post about cats and dogs", "TL;DR: cats and dogs\n\n  two  spaces", "naïve café 猫"] * 20
SCRATCH = {"model_type": "gpt_neox", **ARCHITECTURES["gpt_neox"]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A folder with a GPT-2 (dropout 0.1 in its config) that embeds exactly the ids of its tokenizer."""
    path = tmp_path_factory.mktemp("policy") / "gpt2"
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    tiny_model("gpt2", vocab_size=len(tokenizer), **dropouts).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# --- tokenizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " cats", "zażółć 猫\t\r\n \x00", "  a  b\n\n\nc ", "🦊🦊", "[PAD"])
def test_a_trained_tokenizer_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_trained_tokenizer_has_distinct_stop_and_pad_and_adds_nothing(tokenizer, tmp_path):
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "[PAD]")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    ids = tokenizer("cats and dogs").input_ids
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert len(ids) < len("cats and dogs") / 2, "merges were learnt"
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() == train_tokenizer(TEXTS, 300).get_vocab()
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="258"):
        train_tokenizer(TEXTS, 257)


@pytest.mark.parametrize("pad_token", [None, "<|endoftext|>"])
def test_a_pad_token_is_added_where_there_is_none_of_its_own(tokenizer, tmp_path, pad_token):
    tokenizer.save_pretrained(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["pad_token"] = pad_token
    config_file.write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token == "[PAD]" and loaded.pad_token_id != loaded.eos_token_id
    assert loaded("cats").input_ids == tokenizer("cats").input_ids


def test_a_pad_token_of_its_own_is_kept(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.add_special_tokens({"pad_token": "<filler>"})
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<filler>"


def test_tokenizer_errors_say_what_is_there(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="model.tokenizer: no folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no tokenizer.json; it holds notes.txt"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["eos_token"] = None
    config_file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no eos token"):
        load_tokenizer(tmp_path)


# --- policies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gpt2", "opt", "gemma2"]
)
def test_from_scratch_fits_the_tokenizer_and_follows_the_seed(model_type, tokenizer):
    config = ModelConfig(architecture={"model_type": model_type, **ARCHITECTURES[model_type]}, vocab_size=300)
    state = torch.get_rng_state()
    models = [load_policy(config, tokenizer, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    embeddings = [model.get_input_embeddings().weight for model in models]
    assert embeddings[0].shape[0] == len(tokenizer)
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])
    assert models[0].config.eos_token_id == tokenizer.eos_token_id
    assert models[0].training


def test_from_a_folder_the_weights_are_as_saved_and_nothing_is_resized(saved, tokenizer):
    padded = AutoTokenizer.from_pretrained(saved)
    padded.add_special_tokens({"pad_token": "<one more>"})
    assert padded.pad_token_id == len(tokenizer)
    policy = load_policy(ModelConfig(path=saved), padded)
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert policy.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in policy.state_dict().items())


def test_dropout_is_off_in_training_mode(saved, tokenizer):
    policy = load_policy(ModelConfig(path=saved), tokenizer)
    ids = torch.arange(3, 40)[None]
    assert policy.training
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    assert torch.equal(policy(ids).logits, policy.eval()(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "dropouts"),
    [
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("opt", {"attention_dropout": 0.5, "dropout": 0.5, "layerdrop": 0.3}),
        ("bloom", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
    ],
)
def test_every_kind_of_dropout_is_switched_off(model_type, dropouts):
    model = tiny_model(model_type, **dropouts).train()
    ids = torch.arange(3, 40)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(getattr(model.config, name) == 0 for name in dropouts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(saved, tokenizer, dtype):
    for config in (
        ModelConfig(path=saved, dtype=dtype),
        ModelConfig(architecture=SCRATCH, vocab_size=300, dtype=dtype),
    ):
        assert {p.dtype for p in load_policy(config, tokenizer).parameters()} == {getattr(torch, dtype)}


def test_dtype_auto_is_that_of_the_folder(tokenizer, tmp_path):
    tiny_model("llama", vocab_size=300).bfloat16().save_pretrained(tmp_path)
    assert load_policy(ModelConfig(path=str(tmp_path), dtype="auto"), tokenizer).dtype == torch.bfloat16


def test_attention_implementation(saved, tokenizer):
    for config in (
        ModelConfig(path=saved, attn_implementation="eager"),
        ModelConfig(architecture=SCRATCH, vocab_size=300, attn_implementation="eager"),
    ):
        assert load_policy(config, tokenizer).config._attn_implementation == "eager"


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_really_recomputes(model_type, rank, tokenizer, tmp_path):
    tiny_model(model_type, vocab_size=300).save_pretrained(tmp_path)
    calls, gradients = {}, {}
    for checkpointing in (False, True):
        config = ModelConfig(
            path=str(tmp_path), gradient_checkpointing=checkpointing, lora=LoraConfig(r=rank)
        )
        policy = load_policy(config, tokenizer)
        mlps = [m for name, m in policy.named_modules() if name.endswith((".mlp", ".fc1"))]
        assert len(mlps) == 2
        seen = []
        for mlp in mlps:
            mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(module))
        policy(torch.arange(3, 40)[None]).logits.float().logsumexp(-1).sum().backward()
        calls[checkpointing] = len(seen)
        gradients[checkpointing] = [p.grad for p in policy.parameters() if p.requires_grad]
    assert calls == {False: 2, True: 4}
    assert len(gradients[True]) > 4
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_lora_trains_all_linear_layers_but_the_head(saved, tokenizer):
    policy = load_policy(ModelConfig(path=saved, lora=LoraConfig(r=3, alpha=6)), tokenizer, seed=5)
    again = load_policy(ModelConfig(path=saved, lora=LoraConfig(r=3, alpha=6)), tokenizer, seed=5)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"c_attn", "c_proj", "c_fc"}
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in trained.items())
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(policy(ids).logits, base(ids).logits), "a fresh adapter changes nothing"


def test_lora_target_modules(saved, tokenizer):
    config = ModelConfig(path=saved, lora=LoraConfig(r=3, target_modules=["c_attn"]))
    names = [name for name, p in load_policy(config, tokenizer).named_parameters() if p.requires_grad]
    assert len(names) == 4 and all(".c_attn.lora_" in name for name in names)
    config = ModelConfig(path=saved, lora=LoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj; the names are c_attn, c_fc, c_proj"):
        load_policy(config, tokenizer)


# --- errors ---------------------------------------------------------------------------------------------


def test_a_missing_folder_names_its_neighbours(saved, tokenizer, tmp_path):
    (tmp_path / "policy_a").mkdir()
    with pytest.raises(ValueError, match=r"model.path: no folder .*policy_b.* holds policy_a/"):
        load_policy(ModelConfig(path=str(tmp_path / "policy_b")), tokenizer)


def test_a_folder_without_a_config_says_what_it_holds(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no config.json; it holds nothing"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="it holds adapter_config.json; this is a bare adapter"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)


def test_an_unreachable_hub_id(tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model.path: 'nobody/nothing' is no folder here, and the hub"):
        load_policy(ModelConfig(path="nobody/nothing"), tokenizer)


@pytest.mark.parametrize(
    ("auto_class", "model_type", "sizes", "name"),
    [
        (
            AutoModelForMaskedLM,
            "bert",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            "BertForMaskedLM",
        ),
        (
            AutoModelForSeq2SeqLM,
            "t5",
            {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_other_kinds_of_model_are_refused(auto_class, model_type, sizes, name, tokenizer, tmp_path):
    auto_class.from_config(AutoConfig.for_model(model_type, vocab_size=300, **sizes)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=f"{name}; a decoder-only causal language model is needed"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)


def test_weights_without_a_language_model_head_are_refused(tokenizer, tmp_path):
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path)
    tiny_model("llama", vocab_size=300).model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    with pytest.raises(ValueError, match="LlamaModel; a decoder-only"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="lacks 1 weights, which would be random: lm_head.weight"):
        load_policy(ModelConfig(path=str(tmp_path)), tokenizer)


def test_a_tokenizer_of_another_model_is_refused(saved):
    with pytest.raises(ValueError, match="model.tokenizer: token .* the model embeds 300 ids"):
        load_policy(ModelConfig(path=saved), train_tokenizer(TEXTS, 310))


def test_no_model_at_all(tokenizer):
    with pytest.raises(ValueError, match="model.path"):
        load_policy(ModelConfig(), tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "a", "architecture": SCRATCH}, "^architecture is for a model from scratch"),
        ({"architecture": {"hidden_size": 3}, "vocab_size": 300}, "^architecture.model_type is unknown"),
        ({"architecture": {"model_type": "gptneox"}, "vocab_size": 300}, "did you mean .*gpt_neox"),
        (
            {"architecture": {**SCRATCH, "hiden_size": 3}, "vocab_size": 300},
            "hiden_size.*did you mean hidden_size",
        ),
        ({"architecture": SCRATCH}, "^vocab_size "),
        ({"path": "a", "vocab_size": 300}, "^vocab_size "),
        ({"architecture": SCRATCH, "vocab_size": 100}, "^vocab_size must be >= 258 or null, got 100"),
        ({"architecture": SCRATCH, "vocab_size": 300, "lora": LoraConfig(r=2)}, "^lora.r .* set it to 0"),
    ],
)
def test_config_names_the_bad_key(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"r": -1}, "r"), ({"alpha": 0.0}, "alpha"), ({"target_modules": []}, "target_modules")],
)
def test_lora_config_names_the_bad_key(settings, key):
    with pytest.raises(ValueError, match=f"^{key} "):
        LoraConfig(**settings)


def test_config_is_a_recipe():
    assert OmegaConf.to_object(OmegaConf.structured(ModelConfig)) == ModelConfig()
    overrides = ["architecture.model_type=llama", "architecture.hidden_size=64", "vocab_size=300"]
    config = load_recipe(ModelConfig, None, overrides)
    assert config.architecture == {"model_type": "llama", "hidden_size": 64}
    config = load_recipe(ModelConfig, None, ["path=a/b", "lora.r=8", "lora.target_modules=[q_proj,v_proj]"])
    assert config.lora == LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    assert all(option.help for option in options(ModelConfig))


# --- export ---------------------------------------------------------------------------------------------


def test_a_saved_policy_loads_with_from_pretrained(saved, tokenizer, tmp_path):
    policy = load_policy(ModelConfig(path=saved), tokenizer)
    with torch.no_grad():
        policy.transformer.h[0].mlp.c_fc.weight.add_(0.1)
    path = tmp_path / "run" / "policy"
    save_policy(policy, tokenizer, path, "# A card\n")
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(loaded(ids).logits, policy.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab()
    assert (path / "README.md").read_text() == "# A card\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["policy"]


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2", "opt"])
def test_a_saved_lora_policy_is_plain_and_merged(model_type, tokenizer, tmp_path):
    tiny_model(model_type, vocab_size=300).save_pretrained(tmp_path / "base")
    policy = load_policy(ModelConfig(path=str(tmp_path / "base"), lora=LoraConfig(r=2)), tokenizer)
    for name, parameter in policy.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 40)[None]
    before = policy(ids).logits
    save_policy(policy, tokenizer, tmp_path / "policy", "")
    assert torch.equal(policy(ids).logits, before), "saving changes nothing"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    torch.testing.assert_close(loaded(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits, before, atol=0.1
    )
    assert not list((tmp_path / "policy").glob("adapter*"))


def test_saving_replaces_an_older_folder_whole(saved, tokenizer, tmp_path):
    policy = load_policy(ModelConfig(path=saved), tokenizer)
    path = tmp_path / "policy"
    path.mkdir()
    (path / "stale.txt").write_text("old")
    (tmp_path / ".partial_policy").mkdir()
    (tmp_path / ".partial_policy" / "half.txt").write_text("left by a kill")
    save_policy(policy, tokenizer, path, "new")
    assert (path / "README.md").read_text() == "new"
    assert not (path / "stale.txt").exists() and not (path / "half.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy"]


def test_a_failed_save_leaves_the_older_folder(saved, tokenizer, tmp_path):
    policy = load_policy(ModelConfig(path=saved), tokenizer)
    path = tmp_path / "policy"
    save_policy(policy, tokenizer, path, "old")
    with pytest.raises(UnicodeEncodeError):
        save_policy(policy, tokenizer, path, "a lone surrogate cannot be written: \ud800")
    assert (path / "README.md").read_text() == "old"


@pytest.mark.parametrize("name", ["nonsense", "flash_attention_2"])
def test_an_attention_that_cannot_be_used_is_named_by_its_key(tmp_path, name):
    tokenizer = train_tokenizer(["a text"], 300)
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    architecture |= {"intermediate_size": 32}
    policy = load_policy(ModelConfig(architecture=architecture, vocab_size=300), tokenizer)
    policy.save_pretrained(tmp_path / "policy")
    ScalarModel.from_causal_lm(policy).save_pretrained(tmp_path / "critic")
    said = f"^model.attn_implementation: '{name}' cannot be used here: .*eager or sdpa"
    fresh = ModelConfig(architecture=architecture, vocab_size=300, attn_implementation=name)
    saved = ModelConfig(path=str(tmp_path / "policy"), attn_implementation=name)
    for config in (fresh, saved):
        with pytest.raises(ConfigError, match=said):
            load_policy(config, tokenizer)
    with pytest.raises(ConfigError, match=said):
        load_critic(str(tmp_path / "critic"), saved)
