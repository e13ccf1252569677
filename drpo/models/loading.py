"""Load policies and critics from a folder or the hub, or make them from scratch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from drpo.config import ConfigError, Section, key, refuse, setting
from drpo.models.adapters import add_lora
from drpo.models.attention import attention_errors
from drpo.models.causal_lm import fresh_causal_lm, read_causal_lm
from drpo.models.four_bit import choose_layers
from drpo.models.model_folder import check_complete, kind_of, read_config
from drpo.models.probes import can_probe_now, check_policy, check_scalar_model
from drpo.models.scalar_head import ScalarModel
from drpo.models.tokenizer import SMALLEST_VOCABULARY
from drpo.models.trunk import freeze_trunk, has_trunk, same_trunk, share_trunk, trained_layer_names
from drpo.models.vocabulary import check_embedded, check_own_vocabulary

Scalar = TypeVar("Scalar", bound=ScalarModel)

_ROPE_KEYS = {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"}


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) in place of full fine-tuning; without dropout."""

    r: int = setting(0, ge=0)
    """Rank of the update; 0 trains all weights."""
    alpha: float = setting(16.0, gt=0)
    """The update is scaled by alpha / r."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get an adapter; null: all but the output embedding and the routers of experts.
    Experts that transformers keeps as one fused parameter get none."""

    def check(self) -> None:
        rule = "is empty; name layers, or null for all linear layers"
        refuse(self.target_modules == [], "target_modules", rule)


@dataclass(frozen=True)
class ModelConfig(Section):
    """Source of a model, its precision, and how it is trained."""

    path: str | None = None
    """Folder or hub id of a causal language model, a GGUF file, or smollm2; null: from scratch, by
    model.architecture."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """From scratch: model_type and further keys of that transformers config (hidden_size, ...)."""
    tokenizer: str | None = None
    """Folder, hub id or GGUF file of the tokenizer; null: the model's own, or from scratch one trained on the data."""
    vocab_size: int | None = setting(None, ge=SMALLEST_VOCABULARY)
    """Size of the byte-level BPE tokenizer that is trained on the data (from scratch without a tokenizer)."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the weights; auto: as saved. Trained weights are float32 (bf16 autocast comes on top), but for
    DeepSpeed, which keeps float32 copies; under LoRA the frozen base may be bfloat16."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; null: transformers' choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trainable_layers: int | None = setting(None, ge=1)
    """Train this many of the top layers (in full or with LoRA) and freeze what is below: policy, reference, critic and,
    if it was trained so from the same weights, the reward model share it, and it runs once for a batch of rollouts."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    load_in_4bit: bool = False
    """With LoRA: hold the frozen linear layers in 4 bits (NF4 with double quantisation, QLoRA). Training and the saved
    policy use the rounded weights; needs bitsandbytes."""

    def check(self) -> None:
        scratch = bool(self.architecture)
        rule = f"is for a model from scratch; give it or {key('path')}, not both"
        refuse(scratch and self.path is not None, "architecture", rule)
        if scratch:
            _check_architecture(self.architecture)
            rule = f"must be given for a model from scratch, or {key('tokenizer')}"
            refuse(self.tokenizer is None and self.vocab_size is None, "vocab_size", rule)
            rule = "freezes trained layers; set it to null for a model from scratch"
            refuse(self.trainable_layers is not None, "trainable_layers", rule)
            rule = "adds adapters to a trained model; set it to 0 for a model from scratch"
            refuse(self.lora.r > 0, "lora.r", rule)
        rule = (
            f"holds the frozen base under an adapter in 4 bits: set {key('lora.r')}, or load_in_4bit to false"
        )
        refuse(self.load_in_4bit and not self.lora.r, "load_in_4bit", rule)
        for name in ("path", "tokenizer"):
            rule = f"is for a tokenizer trained on the data; leave it out beside {key(name)}"
            refuse(None not in (self.vocab_size, getattr(self, name)), "vocab_size", rule)

    def without_adapter(self, **changes: Any) -> ModelConfig:
        """Return the config of a plain frozen model with these changes."""
        return replace(self, **{"lora": LoraConfig(), "load_in_4bit": False, **changes})


def _check_architecture(architecture: dict[str, Any]) -> None:
    model_type = architecture.get("model_type")
    if model_type not in CONFIG_MAPPING:
        close = ", ".join(difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=5))
        advice = f"did you mean {close}?" if close else "for example gpt_neox or llama"
        refuse(True, "architecture.model_type", f"is unknown to transformers, got {model_type!r}; {advice}")
    default = CONFIG_MAPPING[model_type]()
    for name in architecture:
        if name != "model_type" and name not in _ROPE_KEYS and not hasattr(default, name):
            close = ", ".join(difflib.get_close_matches(name, vars(default), n=3))
            advice = f"; did you mean {close}?" if close else ""
            refuse(True, f"architecture.{name}", f"is no key of {model_type}{advice}")


def load_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int = 0, key: str = "model.path"
) -> PreTrainedModel:
    """Load a causal language model without dropout, in training mode; a PeftModel when `config.lora.r` > 0.

    It comes from `config.path`, or has fresh weights by `config.architecture` and the size of the tokenizer. The
    embedding is never resized. Raises ConfigError naming the key (`key` for the path) when there is no such model, it
    is not a causal language model, weights are missing, the tokenizer has ids that the model does not embed,
    model.tokenizer differs from the model's own, or padded rows or cached steps change the outputs (`check_policy`).
    """
    if config.path is not None:
        if config.tokenizer not in (None, config.path):
            check_own_vocabulary(tokenizer, config.path, key)
        model = read_causal_lm(config, key)
    elif config.architecture:
        model = fresh_causal_lm(config, tokenizer, seed)
    else:
        raise ConfigError("no model: give model.path, or model.architecture for one from scratch")
    check_embedded(model, tokenizer)
    if can_probe_now(model):
        check_policy(model, key if config.path else "model.architecture.model_type")
    return prepare_to_train(model, config, seed)


def load_scalar_model(
    path: str | Path, config: ModelConfig, model_class: type[Scalar] = ScalarModel, key: str = "path"
) -> Scalar:
    """Load a saved ScalarModel (or subclass), or any Hugging Face *ForSequenceClassification with one label.

    Of `config`, dtype, attn_implementation, gradient_checkpointing and lora apply; with LoRA the head is
    trained whole. Raises ConfigError, naming the `key` of the recipe, when `path` holds neither.
    """
    return prepare_to_train(_read_scalar(str(path), config, model_class, key), config, seed=0)


def load_critic(
    path: str, config: ModelConfig, seed: int = 0, policy: nn.Module | None = None
) -> ScalarModel:
    """Load a critic from a saved scalar model; a reward model's centre goes into its bias, so V has its zero.

    Raises ConfigError for a reward model that sums its head over the tokens, since its outputs are not values, and for
    one that does not share the frozen trunk of `policy`, if that has one.
    """
    saved = read_config(path, "critic.path")
    if saved.get("aggregation", "last") != "last":
        raise ConfigError(
            f"critic.path: {path!r} sums its head over the tokens, so its outputs are no values; set critic.path=null"
        )
    critic = _read_scalar(path, config, ScalarModel, "critic.path")
    with torch.no_grad():
        critic.head.bias -= saved.get("centre", 0.0)
        for parameter in critic.head.parameters():
            parameter /= saved.get("scale", 1.0)
    # They are in the head, training then moves it, and the critic is saved too.
    critic.config.update({"centre": 0.0, "scale": 1.0, "score_normalised": []})
    if policy is not None and has_trunk(policy):
        if not same_trunk(critic, policy):
            raise ConfigError(
                f"critic.path: with model.trainable_layers policy and critic share the layers below, but those of "
                f"{path!r} are not the policy's; give a model that was trained with model.trainable_layers from the "
                "same weights, or null for a critic that starts from the policy"
            )
        share_trunk(critic, policy)
    return prepare_to_train(critic, config, seed)


def _read_scalar(path: str, config: ModelConfig, model_class: type[Scalar], key: str) -> Scalar:
    saved = read_config(path, key)
    if "backbone" in saved:
        # Without its model_type: transformers would warn of a reward model that becomes a critic, as intended here.
        fields = {name: value for name, value in saved.items() if name != "model_type"}
        model_config = model_class.config_class.from_dict(fields)
        model, info = model_class.from_pretrained(
            path, dtype=config.dtype, config=model_config, output_loading_info=True
        )
        check_complete(info, path, key)
    elif any(name.endswith("ForSequenceClassification") for name in saved.get("architectures") or []):
        model = _from_sequence_classifier(path, config.dtype, model_class, key)
    else:
        raise ConfigError(
            f"{key}: {path!r} holds {kind_of(saved)}: neither a scalar model nor a *ForSequenceClassification; "
            "launch/reward_model.py makes a reward model of a policy; a critic with a fresh head comes from the "
            "policy, without a path"
        )
    if config.attn_implementation is not None:
        with attention_errors(config.attn_implementation):
            model.backbone.set_attn_implementation(config.attn_implementation)
    if can_probe_now(model.backbone):
        check_scalar_model(model, key)
    return model


def fresh_critic(policy: nn.Module, config: ModelConfig, seed: int = 0) -> ScalarModel:
    """Make a critic with the policy's backbone (LoRA folded in) and, under LoRA, its own adapter; V = 0 at first.

    A random head would start with values of size 1, which value clipping then takes many updates to undo.
    """
    critic = ScalarModel.from_causal_lm(policy, seed)
    if can_probe_now(critic.backbone):
        check_scalar_model(critic)
    if has_trunk(policy):
        share_trunk(critic, policy)
    nn.init.zeros_(critic.head.weight)
    return prepare_to_train(critic, config, seed)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout, layer-drop and router-jitter probability in the modules and the config to 0."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for holder in (*model.modules(), *configs):
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and re.search("drop|jitter", name):
                setattr(holder, name, 0.0)


def prepare_to_train(model: PreTrainedModel, config: ModelConfig, seed: int) -> PreTrainedModel:
    """Turn dropout off, freeze the trunk, add the adapter and set checkpointing, as the config says.

    Layers that are to be held in 4 bits are chosen; `Engine.hold_frozen` quantises them on their device.
    """
    disable_dropout(model)
    if config.trainable_layers is not None:
        freeze_trunk(model, config.trainable_layers)
    model.gradient_checkpointing_disable()
    plain = model
    if config.lora.r:
        model = add_lora(
            model,
            r=config.lora.r,
            alpha=config.lora.alpha,
            target_modules=config.lora.target_modules,
            seed=seed,
            trained_whole=("head",) if isinstance(model, ScalarModel) else (),
            within=() if config.trainable_layers is None else trained_layer_names(model),
        )
    if config.load_in_4bit:
        choose_layers(model)
    if config.gradient_checkpointing:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    # Not needed without reentrance: embeddings that require gradients would build a graph in a frozen trunk.
    plain.disable_input_require_grads()
    # Layers recompute activations in training mode only, and from_pretrained leaves a model in evaluation mode.
    return model.train()


def _from_sequence_classifier(path: str, dtype: str, model_class: type[Scalar], key: str) -> Scalar:
    """Load a classifier, with what the config of one that reward_models.export wrote says of its scores.

    `score_constant` is what its logit lacks.
    """
    source, info = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, output_loading_info=True
    )
    check_complete(info, path, key)
    head = getattr(source, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ConfigError(
            f"{key}: {path!r} holds {type(source).__name__} with {source.config.num_labels} labels; a score needs a "
            "decoder with a linear head `score` and num_labels=1"
        )
    model = model_class.from_backbone(source, source.state_dict())
    if hasattr(source.config, "score_normalised"):  # else these names may mean anything
        defaults = {"score_normalised": [], "chat_template": None, "chat_template_kwargs": {}}
        model.config.update({name: getattr(source.config, name, value) for name, value in defaults.items()})
    with torch.no_grad():
        model.head.weight.copy_(head.weight)
        bias = torch.zeros(1) if head.bias is None else head.bias
        model.head.bias.copy_(bias + getattr(source.config, "score_constant", 0.0))
    return model
