"""Write a reward model as the sequence classifier of transformers that other tools read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError
from drpo.models.export import save_policy
from drpo.models.loading import ModelConfig, load_scalar_model
from drpo.models.plain_folder import amend_json
from drpo.models.tokenizer import load_tokenizer
from reward_models.model import RewardModel


def export_classifier(path: str, folder: Path, key: str = "path") -> list[str]:
    """Write the reward model of `path` as a *ForSequenceClassification with one label; return notes for its users.

        score = logit + constant,    logit = h . w / scale,    constant = (b - centre) / scale

    h is the hidden state at the last token. Where the classifier's head has no bias, as in most models, its logits lack
    the constant, which changes no comparison; it is the config's `score_constant`, which DRPO adds again when it loads
    the folder. The config's `score_normalised` names which of centre and scale the score was given, and `chat_template`
    with `chat_template_kwargs` which texts it was trained on. Transformers takes the last token that is not padding:
    where the tokenizer has no other one to pad with than the one that ends responses, the folder names none, and rows
    must come one at a time.

    Raises ConfigError for a model that sums its head over the tokens, or one that has no such class.
    """
    model = load_scalar_model(path, ModelConfig(dtype="auto"), RewardModel, key)
    config = model.config
    if config.aggregation != "last":
        raise ConfigError(
            f"{key}: {path!r} sums its head over the tokens, and a sequence classifier reads the last one alone; train "
            "one with score.aggregation=last"
        )
    classifier = classifier_of(model.backbone, key)
    constant = (model.head.bias.item() - config.centre) / config.scale
    with torch.no_grad():
        classifier.score.weight.copy_(model.head.weight / config.scale)
        if classifier.score.bias is not None:
            classifier.score.bias.fill_(constant)
            constant = 0.0
    classifier.config.score_constant = constant
    classifier.config.score_normalised = [what for what in ("centre", "scale") if config.was_given(what)]
    classifier.config.chat_template = config.chat_template
    classifier.config.chat_template_kwargs = config.chat_template_kwargs
    notes = [f"score = logit + {constant:.6g}: the classifier's head has no bias"] if constant else []
    tokenizer = load_tokenizer(path, key)
    pad_token = padding_of(tokenizer, classifier.get_input_embeddings().num_embeddings)
    if pad_token is None:
        notes.append("no token can be padding: score one row at a time")
    else:
        tokenizer.pad_token = pad_token
    save_policy(
        classifier, tokenizer, folder, "\n".join([f"A reward model of DRPO, made of {path}.", *notes, ""])
    )
    if pad_token is None:
        amend_json(folder / "config.json", pad_token_id=None)
    return notes


def padding_of(tokenizer: PreTrainedTokenizerBase, num_embedded: int) -> str | None:
    """Return a special token that the model embeds and that is not the stop token: the pad token if it is one."""
    special = [tokenizer.pad_token, *tokenizer.all_special_tokens]
    ids = tokenizer.convert_tokens_to_ids(special)
    usable = [
        token
        for token, i in zip(special, ids, strict=True)
        if i is not None and i < num_embedded and i != tokenizer.eos_token_id
    ]
    return usable[0] if usable else None


def classifier_of(backbone: PreTrainedModel, key: str) -> PreTrainedModel:
    """Make the sequence classifier of a backbone, with its weights, and a head `score` still to be set."""
    backbone.config.num_labels = 1
    try:
        classifier = AutoModelForSequenceClassification.from_config(backbone.config)
    except ValueError:
        classifier = None
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{key}: transformers has no sequence classifier of {type(backbone).__name__} with a linear head `score`"
        )
    getattr(classifier, classifier.base_model_prefix).load_state_dict(backbone.state_dict())
    head.to(torch.float32)
    return classifier
