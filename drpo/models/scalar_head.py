"""A backbone with one number per token: the critic, and the base of reward models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from drpo.models.adapters import merged_state_dict
from drpo.models.inputs import model_inputs, unwrap_peft
from drpo.models.probes import check_scalar_model
from drpo.tensors import PaddedBatch


class ScalarModelConfig(PreTrainedConfig):
    """Config of a ScalarModel: `backbone` is the config of the transformers model under the head, as a dict."""

    model_type = "drpo_scalar_model"

    def __init__(self, backbone: dict[str, Any] | None = None, **kwargs) -> None:
        self.backbone = backbone or {}
        super().__init__(**kwargs)

    def backbone_config(self) -> PreTrainedConfig:
        """Return the backbone's config as a transformers object; raise ValueError when there is none."""
        if "model_type" not in self.backbone:
            raise ValueError(
                "the config has no `backbone` with a model_type: this is not a scalar model's config"
            )
        return CONFIG_MAPPING[self.backbone["model_type"]].from_dict(dict(self.backbone))

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's output."""
        config = self.backbone_config().get_text_config()
        return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


class ScalarHead(nn.Linear):
    """h . w + b, (B, T, H) to (B, T), always in float32: under bf16 a value of 3 would be off by 0.01."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ScalarModel(PreTrainedModel):
    """v(x_1..t) = w . h_t + b at every token, h the backbone's last hidden state.

    A subclass sets `config_class`; keys that it adds to the config are saved and loaded with it.
    """

    config_class = ScalarModelConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["head"]  # in any precision of the backbone

    def __init__(self, config: ScalarModelConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config())
        self.head = ScalarHead(config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ScalarHead):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features + 1))
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return one float32 number per token, (B, T), for ids and mask (B, T); positions default to the mask's."""
        return self.head(self.hidden(input_ids, attention_mask, position_ids))

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return the backbone's last hidden states, (B, T, H)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = model_inputs(self.backbone, input_ids, attention_mask.bool())
        if position_ids is not None and "position_ids" in inputs:
            inputs["position_ids"] = position_ids
        return self.backbone(**inputs, use_cache=False).last_hidden_state

    @classmethod
    def from_causal_lm(cls, model: nn.Module, seed: int = 0) -> ScalarModel:
        """Copy a causal LM's backbone (LoRA folded in) under a fresh head: w ~ N(0, 1 / (H + 1)), b = 0.

        The scale is that of "The N+ Implementation Details of RLHF with PPO", detail 8. Gradient checkpointing
        and the attention implementation are those of `model`, which shares nothing with the copy.
        """
        causal_lm = unwrap_peft(model)
        scalar_model = cls.from_backbone(causal_lm, merged_state_dict(model))
        width = scalar_model.head.in_features
        weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
        with torch.no_grad():
            scalar_model.head.weight.copy_(weight)
            scalar_model.head.bias.zero_()
        return scalar_model

    @classmethod
    def from_backbone(cls, source: PreTrainedModel, weights: dict[str, Tensor]) -> ScalarModel:
        """Copy the backbone of `source`, whose `weights` are given by name; the head is left uninitialised."""
        backbone = source.config.to_dict()
        for key in ("dtype", "architectures"):  # these belong to the model as a whole
            backbone.pop(key, None)
        with no_init_weights():
            scalar_model = cls(cls.config_class(backbone=backbone))
        prefix = source.base_model_prefix + "."
        _cast_like(source.base_model, scalar_model.backbone)
        scalar_model.to(source.device)
        scalar_model.config.dtype = source.dtype
        scalar_model.backbone.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        )
        scalar_model.backbone.set_attn_implementation(source.config._attn_implementation)
        if source.is_gradient_checkpointing:
            scalar_model.gradient_checkpointing_enable()
        return scalar_model.train(source.training)


def _cast_like(source: nn.Module, backbone: nn.Module) -> None:
    """Give each weight and buffer the dtype that it has in `source`, which may hold adapters.

    A half-precision model keeps some in float32, such as the frequencies of rotary positions: in bfloat16 a position
    would be off by hundreds of tokens.
    """
    tensors = (*source.named_parameters(), *source.named_buffers())
    dtypes = {name.replace(".base_layer.", "."): tensor.dtype for name, tensor in tensors}
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        tensor.data = tensor.data.to(dtypes[name])


AutoConfig.register(ScalarModelConfig.model_type, ScalarModelConfig)
AutoModel.register(ScalarModelConfig, ScalarModel)


def token_values(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Return V before each response token, (B, R) float32: the model's output at columns Q-1 .. Q+R-2.

    Raises ConfigError as `check_scalar_model` does.
    """
    check_scalar_model(model)  # probed at loading, except in half precision
    first, length = batch.queries.shape[1] - 1, batch.responses.shape[1]
    return model(batch.query_responses, batch.attention_mask)[:, first : first + length]


def token_hidden(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Return the hidden states before each response token and after the last, (B, R+1, H): columns Q-1 .. Q+R-1.

    Raises ConfigError as `check_scalar_model` does.
    """
    check_scalar_model(model)
    hidden = unwrap_peft(model).hidden(batch.query_responses, batch.attention_mask)
    return hidden[:, batch.queries.shape[1] - 1 :]
