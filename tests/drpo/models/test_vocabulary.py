"""A second model must know the policy's tokens, and texts that look like the policy's."""

from __future__ import annotations

import pytest
import torch
from online_runs import merged, run_online, save_tiny_policy
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoTokenizer

from drpo.config import ConfigError
from drpo.data.load import DataConfig
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.scalar_head import ScalarModel
from drpo.models.tokenizer import load_tokenizer, train_tokenizer
from drpo.models.vocabulary import check_same_texts, check_same_vocabulary, check_trained_alike
from drpo.trainers.sft import tokenizer_for
from reward_models.model import RewardModelConfig


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary") / "policy"
    save_tiny_policy(folder)
    return folder


def saved(tokenizer, folder, **changes) -> str:
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_same_tokens_pass_and_pad_tokens_may_differ(tmp_path):
    own = byte_level()
    check_same_texts(own, saved(byte_level(), tmp_path / "same"), "critic.path", chat=True)
    path = saved(
        byte_level(), tmp_path / "pad", pad_token="<|endoftext|>"
    )  # so that loading adds another "[PAD]"
    check_same_texts(own, path, "critic.path", chat=True)


def test_another_vocabulary_of_equal_size_is_refused(tmp_path):
    own = train_tokenizer(["many cats and some dogs"] * 20, 262)
    other = train_tokenizer(["birds with very wide wings"] * 20, 262)
    assert len(own) == len(other)
    with pytest.raises(
        ConfigError, match="critic.path: .* another vocabulary than the policy's .*tokens differ"
    ):
        check_same_vocabulary(own, saved(other, tmp_path / "other"), "critic.path")
    with pytest.raises(ConfigError, match="reference.path: its tokenizer must be there too"):
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare" / "config.json").write_text("{}")
        check_same_vocabulary(own, str(tmp_path / "bare"), "reference.path")


def test_a_model_that_is_not_there_is_named_by_its_key(tmp_path):
    absent = {"none": "no folder", "none.gguf": "no file"}
    (tmp_path / "empty").mkdir()
    for name, said in {**absent, "empty": ".* has no config.json; it holds nothing"}.items():
        path = str(tmp_path / name)
        with pytest.raises(ConfigError, match=f"^critic.path: {said}"):
            check_same_vocabulary(byte_level(), path, "critic.path")
        with pytest.raises(ConfigError, match=f"^sample.kl_reference: {said}"):
            load_policy(ModelConfig(path=path), byte_level(), key="sample.kl_reference")
    for name, said in absent.items():
        for key in ("path", "tokenizer"):
            with pytest.raises(ConfigError, match=f"^model.{key}: {said}"):
                tokenizer_for(ModelConfig(**{key: str(tmp_path / name)}), DataConfig())


def test_a_tokenizer_of_another_vocabulary_than_the_models_own_is_refused(policy, tmp_path):
    other = saved(train_tokenizer(["something else"] * 20, 290), tmp_path / "other")
    config = ModelConfig(path=str(policy), tokenizer=other)
    with pytest.raises(ConfigError, match="^model.tokenizer: .*ids are other tokens there, the first .*null"):
        load_policy(config, load_tokenizer(other))
    own = load_tokenizer(policy)
    own.add_tokens(["<new>"], special_tokens=True)  # beyond the embedding, which says so itself
    more = saved(own, tmp_path / "more")
    with pytest.raises(ConfigError, match="model.tokenizer: token '<new>' has id"):
        load_policy(ModelConfig(path=str(policy), tokenizer=more), load_tokenizer(more))


def test_a_tokenizer_made_from_the_models_own_is_taken(policy, tmp_path):
    model = load_policy(ModelConfig(path=str(policy)), load_tokenizer(policy))
    folder = tmp_path / "model"
    model.resize_token_embeddings(310)
    model.save_pretrained(folder)
    own = AutoTokenizer.from_pretrained(policy)
    beside = saved(own, tmp_path / "beside")
    config = ModelConfig(path=str(folder), tokenizer=beside)
    load_policy(config, load_tokenizer(beside))  # a model without a tokenizer of its own
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    own.add_tokens(["<user>", "<assistant>"], special_tokens=True)
    more = saved(own, tmp_path / "more", eos_token="<user>")
    load_policy(ModelConfig(path=str(folder), tokenizer=more), load_tokenizer(more))


def test_other_ends_and_templates_are_refused_where_texts_matter(tmp_path):
    own = byte_level(chat_template=CHATML)
    other_end = saved(byte_level(chat_template=CHATML), tmp_path / "end", eos_token="<|im_end|>")
    check_same_vocabulary(own, other_end, "reference.path")
    with pytest.raises(ConfigError, match="critic.path: the eos_token of .* '<|im_end|>'"):
        check_same_texts(own, other_end, "critic.path", chat=False)
    plain = saved(byte_level(), tmp_path / "plain")
    check_same_texts(own, plain, "critic.path", chat=False)
    with pytest.raises(ConfigError, match="critic.path: the chat template of .* is missing"):
        check_same_texts(own, plain, "critic.path", chat=True)
    changed = saved(byte_level(chat_template=CHATML.replace("trim", "upper")), tmp_path / "changed")
    with pytest.raises(ConfigError, match="the chat template of .* is another"):
        check_same_texts(own, changed, "critic.path", chat=True)


def test_an_online_run_refuses_a_critic_that_would_read_other_tokens(policy, tmp_path):
    model = load_policy(ModelConfig(path=str(policy)), load_tokenizer(policy))
    ScalarModel.from_causal_lm(model).save_pretrained(tmp_path / "critic")
    saved(train_tokenizer(["something else"] * 20, 300), tmp_path / "critic")
    changes = {"critic": {"path": str(tmp_path / "critic")}}
    with pytest.raises(ConfigError, match="critic.path: .* another vocabulary"):
        run_online(policy, tmp_path / "run", changes)
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "critic")
    assert len(run_online(policy, tmp_path / "run", merged(changes, {"num_steps": 1}))) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_weights_below_float32_are_not_trained_without_copies(policy, dtype, tmp_path):
    model = load_policy(ModelConfig(path=str(policy)), load_tokenizer(policy))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "half")
    changes = {"model": {"dtype": dtype}, "num_steps": 1}
    with pytest.raises(
        ConfigError, match="model.dtype: .*float16.*model.dtype=float32.*model.lora.r.*DeepSpeed"
    ):
        run_online(tmp_path / "half", tmp_path / "run", changes)


@pytest.mark.parametrize("trained", [(False, {}), (True, {}), (True, {"enable_thinking": False}), (None, {})])
@pytest.mark.parametrize("policy", [(False, {}), (True, {}), (True, {"enable_thinking": False})])
def test_a_reward_model_must_have_seen_texts_made_as_the_policys(trained, policy, tmp_path):
    config = RewardModelConfig(chat_template=trained[0], chat_template_kwargs=trained[1])
    config.save_pretrained(tmp_path)
    if trained[0] is None or trained == policy:
        check_trained_alike(str(tmp_path), "critic.path", *policy)
        return
    setting = "chat_template_kwargs=" if trained[0] == policy[0] else f"chat_template={trained[0]}"
    with pytest.raises(ConfigError, match=f"critic.path: .* was trained with data.{setting}"):
        check_trained_alike(str(tmp_path), "critic.path", *policy)
