"""A reward model as the sequence classifier of plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_runs import finished, plain
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from drpo.config import ConfigError
from drpo.models.export import save_policy
from drpo.models.loading import ModelConfig, load_scalar_model
from drpo.models.tokenizer import load_tokenizer, train_tokenizer
from drpo.models.vocabulary import check_trained_alike
from drpo.tensors import pad_batch
from reward_models.export import export_classifier
from reward_models.model import RewardModel

ROWS = [([3, 4, 5], [11, 12]), ([7] * 9, [14]), ([10], [20, 21, 22, 23])]
"The stop token follows."


@pytest.fixture
def tokenizer():
    return train_tokenizer(["one two three. four five!\n"], 270)


def saved(
    folder: Path, tokenizer, model_type: str, size: int | None = None, **config
) -> tuple[str, RewardModel]:
    model = RewardModel.from_causal_lm(
        tiny_model(model_type, vocab_size=size or len(tokenizer)), seed=3
    ).eval()
    with torch.no_grad():
        model.head.bias.fill_(0.7)
    model.config.centre, model.config.scale = 0.25, 1.6
    for name, value in config.items():
        setattr(model.config, name, value)
    save_policy(model, tokenizer, folder / model_type, "card")
    return str(folder / model_type), model


def rows_of(tokenizer) -> list[tuple[list[int], list[int]]]:
    return [(query, [*response, tokenizer.eos_token_id]) for query, response in ROWS]


def scores_of(model: RewardModel, tokenizer) -> list[float]:
    rows = rows_of(tokenizer)
    batch = pad_batch([query for query, _ in rows], [response for _, response in rows], 0)
    with torch.no_grad():
        return model.score(batch).tolist()


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "qwen2", "opt"])
def test_plain_transformers_computes_the_scores_but_for_the_constant(tmp_path, tokenizer, model_type):
    path, model = saved(tmp_path, tokenizer, model_type)
    assert export_classifier(path, tmp_path / "plain")[0].startswith("score = logit + 0.28125")
    constant = (0.7 - 0.25) / 1.6
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert classifier.config.num_labels == 1
    for (query, response), score in zip(rows_of(tokenizer), scores_of(model, tokenizer), strict=True):
        with torch.no_grad():
            logit = classifier(torch.tensor([query + response])).logits.item()
        assert logit + constant == pytest.approx(score, abs=2e-5)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokens.get_vocab() == tokenizer.get_vocab()
    again = load_scalar_model(tmp_path / "plain", ModelConfig(), RewardModel)
    assert scores_of(again, tokenizer) == pytest.approx(scores_of(model, tokenizer), abs=2e-5), (
        "here the constant is there again"
    )


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
@pytest.mark.parametrize(
    "zero_and_unit, given",
    [
        ((0.0, 1.0), []),
        ((0.25, 1.0), ["centre"]),
        ((0.0, 1.6), ["scale"]),
        ((0.25, 1.6), ["centre", "scale"]),
    ],
)
def test_an_exported_model_keeps_what_its_score_was_given(
    tmp_path, tokenizer, model_type, zero_and_unit, given
):
    centre, scale = zero_and_unit
    path, _ = saved(tmp_path, tokenizer, model_type, centre=centre, scale=scale)
    export_classifier(path, tmp_path / "plain")
    export_classifier(str(tmp_path / "plain"), tmp_path / "again")
    for folder in (path, tmp_path / "plain", tmp_path / "again"):
        config = load_scalar_model(folder, ModelConfig(), RewardModel).config
        assert [what for what in ("centre", "scale") if config.was_given(what)] == given


@pytest.mark.parametrize("chat", [None, False, True])
def test_an_exported_model_keeps_what_it_was_trained_on(tmp_path, tokenizer, chat):
    arguments = {"enable_thinking": False} if chat else {}
    path, _ = saved(tmp_path, tokenizer, "llama", chat_template=chat, chat_template_kwargs=arguments)
    export_classifier(path, tmp_path / "plain")
    config = load_scalar_model(tmp_path / "plain", ModelConfig(), RewardModel).config
    assert (config.chat_template, config.chat_template_kwargs) == (chat, arguments)
    if chat is not None:
        with pytest.raises(ConfigError, match=f"critic.path: .*trained with data.chat_template={chat}"):
            check_trained_alike(str(tmp_path / "plain"), "critic.path", not chat, {})
        with pytest.raises(ConfigError, match="critic.path: .*data.chat_template_kwargs"):
            check_trained_alike(str(tmp_path / "plain"), "critic.path", chat, {"other": 1})


def test_an_exported_model_that_does_not_say_which_texts_it_was_trained_on_is_loaded(tmp_path, tokenizer):
    path, _ = saved(tmp_path, tokenizer, "llama")
    export_classifier(path, tmp_path / "plain")
    written = tmp_path / "plain" / "config.json"
    config = json.loads(written.read_text())
    for name in ("chat_template", "chat_template_kwargs"):
        config.pop(name, None)
    written.write_text(json.dumps(config))
    config = load_scalar_model(tmp_path / "plain", ModelConfig(), RewardModel).config
    assert (config.chat_template, config.chat_template_kwargs) == (None, {}) and config.was_given("centre")


@pytest.mark.parametrize("spare", [0, 1])
def test_padded_rows_have_the_logits_of_rows_alone(tmp_path, tokenizer, spare):
    """Also where padding is beyond the embedding, and plain folders pad with the stop token, which is the last one."""
    if not spare:
        tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    path, model = saved(tmp_path, tokenizer, "llama", size=len(tokenizer) - 1 + spare)
    export_classifier(path, tmp_path / "plain")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    pad = classifier.config.pad_token_id
    rows = [query + response for query, response in rows_of(tokenizer)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        together = classifier(ids, attention_mask=mask).logits.flatten().tolist()
        alone = [classifier(torch.tensor([row])).logits.item() for row in rows]
    assert together == pytest.approx(alone, abs=2e-5)


def test_without_a_token_for_padding_rows_come_one_at_a_time(tmp_path):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)} | {"<end>": 60}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert len(tokenizer) == 62, "[PAD] is beyond the embedding"
    path, model = saved(tmp_path, tokenizer, "llama", size=61)
    notes = export_classifier(path, tmp_path / "plain")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert notes[1] == "no token can be padding: score one row at a time"
    assert classifier.config.pad_token_id is None
    for (query, response), score in zip(rows_of(tokenizer), scores_of(model, tokenizer), strict=True):
        with torch.no_grad():
            logit = classifier(torch.tensor([query + response])).logits.item()
        assert logit + (0.7 - 0.25) / 1.6 == pytest.approx(score, abs=2e-5)


def test_sums_and_models_without_a_classifier_are_refused(tmp_path, tokenizer):
    path, _ = saved(tmp_path, tokenizer, "llama", aggregation="sum")
    with pytest.raises(
        ConfigError, match="sums its head over the tokens, and a sequence classifier reads the last"
    ):
        export_classifier(path, tmp_path / "plain")
    with pytest.raises(ConfigError, match="REWARD_MODEL: .*nowhere"):
        export_classifier(str(tmp_path / "nowhere"), tmp_path / "plain", "REWARD_MODEL")


def test_the_command_says_what_the_logits_lack(tmp_path, tokenizer):
    path, _ = saved(tmp_path, tokenizer, "gpt_neox")
    done = finished(plain("export_reward_model"), path, str(tmp_path / "plain"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "score = logit + 0.28125: the classifier's head has no bias" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "plain")
    failed = finished(plain("export_reward_model"), "nowhere", "x", cwd=tmp_path)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
