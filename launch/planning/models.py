"""The models of a training stage, made in a dry run by the code that makes the real ones."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from drpo.config import ConfigError
from drpo.models.answers import answers_of
from drpo.models.four_bit import quantise
from drpo.models.frozen_weights import round_frozen, share_frozen
from drpo.models.inputs import unwrap_peft
from drpo.models.loading import ModelConfig, fresh_critic, prepare_to_train
from drpo.models.model_folder import is_causal_lm
from drpo.models.probes import check_policy, check_scalar_model
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import head_is_plain
from drpo.models.shared_prompt import can_share_prompt
from drpo.models.trunk import has_trunk, share_trunk
from drpo.trainers.offline import OfflineRecipe
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.reference import AdapterOff, FrozenCopy
from launch.planning.architectures import architecture_of, fresh_architecture
from launch.planning.four_bit import SizedNF4Linear, packed_sizes
from launch.planning.sizes import Weights
from reward_models.model import RewardModel
from reward_models.train import RewardModelRecipe, lm_head_of

PROBED_LAYERS = 4
"Enough for one of each kind where windowed and full attention alternate."

_ANSWERS: dict[Hashable, dict[Hashable, Any]] = {}
"What probes found out, by architecture."


@dataclass(frozen=True)
class Precision:
    """Precision of a run: bf16 or float32, and whether the launcher turns the trained weights to bf16 (DeepSpeed)."""

    bf16: bool
    casts_weights: bool

    def autocast(self):
        """Return the context of forwards of the trained module; DeepSpeed has none, its weights are bf16."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16 and not self.casts_weights)

    def frozen_autocast(self):
        """Return the context of forwards of the reward model."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True)
class StageModels:
    """The models in memory during a stage."""

    trained: Mapping[str, nn.Module]
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    reference: AdapterOff | FrozenCopy | None = None
    notes: tuple[str, ...] = ()

    def weights(self) -> dict[str, Weights]:
        """Count each model's weights; what several models share counts for the first of them."""
        seen: set[int] = set()
        return {name: _counted(model, seen) for name, model in {**self.trained, **self.frozen}.items()}


def stage_models(recipe: OfflineRecipe | OnlineRecipe, precision: Precision) -> StageModels:
    """Make the models of a recipe's stage, their weights in the precision that they have in training."""
    match recipe:
        case RewardModelRecipe():
            models = _reward_model(recipe)
        case PreferenceRecipe():
            models = _with_reference(recipe, _policy(recipe.model, "model.path"))
        case OnlineRecipe():
            models = _online(recipe, _policy(recipe.model, "model.path"))
        case _:
            models = StageModels({"policy": _policy(recipe.model, "model.path")})
    for model in models.trained.values():
        _hold(model, precision.bf16, precision.casts_weights)
    for name, model in models.frozen.items():
        model.eval().requires_grad_(False)
        _hold(model, precision.bf16, precision.casts_weights and name == "reference")
    if recipe.model.lora.r and isinstance(recipe, OnlineRecipe):
        _share_bases(recipe, models)
    return models


def _reward_model(recipe: RewardModelRecipe) -> StageModels:
    """Make the model in training and, for a language-model loss, the output embedding beside it."""
    policy = _policy(recipe.model.without_adapter(), "model.path")
    model = RewardModel.from_causal_lm(policy, recipe.seed)
    _probe(model, "model.path")
    frozen = {"output embedding": lm_head_of(policy, model)} if recipe.loss.lm_coef else {}
    by_prompt = recipe.loss.by == "prompt" or recipe.loss.name == "plackett_luce"
    notes = ("sized for two responses a prompt",) * by_prompt
    return StageModels({"reward model": prepare_to_train(model, recipe.model, seed=0)}, frozen, notes=notes)


def _policy(config: ModelConfig, key: str) -> PreTrainedModel:
    if config.path is not None:
        architecture = architecture_of(config.path, key)
    elif config.architecture:
        architecture = fresh_architecture(config.architecture, config.vocab_size)
    else:
        raise ConfigError("no model: give model.path, or model.architecture for one from scratch")
    if not is_causal_lm(architecture.model_type, architecture.architectures):
        raise ConfigError(f"{key}: {config.path!r} is not a causal language model")
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    options = (
        {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, **options)
    model.tie_weights()  # left out with the numbers
    _probe(model, key)  # as loading does: while its weights are of one precision
    return prepare_to_train(model, config, seed=0)


def _probe(model: PreTrainedModel, key: str) -> None:
    """Probe a whole model as loading does, once for an architecture: in a dry run all numbers seem equal."""
    scalar = isinstance(model, ScalarModel)
    attention = (model.backbone if scalar else model).config._attn_implementation
    dtype = model.get_input_embeddings().weight.dtype
    kind = (type(model), model.config.to_json_string(use_diff=False), attention, dtype)
    answers = answers_of(model)
    answers |= copy.deepcopy(_ANSWERS.get(kind, {}))
    with _first_layers(model):
        if scalar:
            check_scalar_model(model, key)
        else:
            check_policy(model, key)
            head_is_plain(model)
        can_share_prompt(model)
    _ANSWERS[kind] = copy.deepcopy(answers)


@contextmanager
def _first_layers(model: nn.Module) -> Iterator[None]:
    """Leave the model its first layers within this context, for probes, whose answers all layers of a kind share."""
    num_layers = getattr(model, "backbone", model).config.get_text_config().num_hidden_layers
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    for parent, name, child in lists:
        setattr(parent, name, child[:PROBED_LAYERS])
    try:
        yield
    finally:
        for parent, name, child in lists:
            setattr(parent, name, child)


def _scalar_model(
    place: tuple[str, str], policy: nn.Module, dtype: str, kind: type[ScalarModel], notes: list[str]
) -> ScalarModel:
    """Make the scalar model at `place`, path and key; one that is not there yet has the policy's architecture."""
    path, key = place
    try:
        architecture = architecture_of(path, key)
    except ConfigError:
        architecture = unwrap_peft(policy).config
        notes.append(f"{key}: {path!r} is not there yet; sized as the policy")
    with no_init_weights():
        model = kind(kind.config_class(backbone=architecture.to_dict()))
    model.backbone.to(getattr(torch, dtype))
    _probe(model, key)
    return model


def _with_reference(recipe: PreferenceRecipe, policy: nn.Module) -> StageModels:
    if not recipe.loss.needs_reference:
        return StageModels({"policy": policy})
    if recipe.reference_is_adapter_off:
        return StageModels({"policy": policy}, reference=AdapterOff(policy))
    source = recipe.model.without_adapter(gradient_checkpointing=False)
    if recipe.reference.path is not None:
        source = replace(
            source, path=recipe.reference.path, architecture={}, vocab_size=None, trainable_layers=None
        )
    return _with_copy({"policy": policy}, source, policy)


def _with_copy(trained: dict[str, nn.Module], source: ModelConfig, policy: nn.Module) -> StageModels:
    reference = _policy(source, "reference.path")
    shares = has_trunk(policy) and has_trunk(reference)
    if shares:
        share_trunk(reference, policy)
    return StageModels(trained, {"reference": reference}, FrozenCopy(reference, shares))


def _online(recipe: OnlineRecipe, policy: nn.Module) -> StageModels:
    trained, notes = {"policy": policy}, []
    if recipe.advantage.needs_critic and recipe.critic.path is None:
        trained["critic"] = fresh_critic(policy, recipe.model, recipe.seed)
        can_share_prompt(trained["critic"])
    elif recipe.advantage.needs_critic:
        place = (recipe.critic.path, "critic.path")
        critic = _scalar_model(place, policy, recipe.model.dtype, ScalarModel, notes)
        if has_trunk(policy):
            share_trunk(critic, policy)
        trained["critic"] = prepare_to_train(critic, recipe.model, recipe.seed)
    models = StageModels(trained, {}, AdapterOff(policy))
    if not recipe.model.lora.r:
        models = _with_copy(trained, replace(recipe.model, gradient_checkpointing=False), policy)
    functions = {"function": recipe.reward.function} | {
        f"parts[{index}].function": part.function for index, part in enumerate(recipe.reward.parts)
    }
    notes += [
        f"reward.{key}={function}: what it keeps in memory is not counted"
        for key, function in functions.items()
        if function is not None
    ]
    rewards = {}
    for name, (key, path) in reward_model_names(recipe).items():
        rewards[name] = _scalar_model(
            (path, f"reward.{key}"), policy, recipe.reward.dtype, RewardModel, notes
        )
        if has_trunk(policy):
            share_trunk(rewards[name], policy)
    return replace(models, frozen={**models.frozen, **rewards}, notes=tuple(notes))


def reward_model_names(recipe: OnlineRecipe) -> dict[str, tuple[str, str]]:
    """Return key and path of the reward models by their names in the plan: reward model, reward model 2, ..."""
    numbered = enumerate(recipe.reward.models.items(), start=1)
    return {"reward model" + f" {number}" * (number > 1): place for number, place in numbered}


def _hold(model: nn.Module, bf16: bool, whole: bool) -> None:
    """Hold weights as a run does: in a bf16 run all in bf16 or the frozen matrices, chosen layers in 4 bits."""
    if bf16 and whole:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    elif bf16:
        round_frozen(model)
    quantise(model, torch.device("cpu"), SizedNF4Linear)


def _share_bases(recipe: OnlineRecipe, models: StageModels) -> None:
    """Share frozen weights where models start from the same ones; in a dry run all numbers seem equal."""
    critic = models.trained.get("critic")
    if critic is not None and recipe.critic.path is None:
        share_frozen(critic, models.trained["policy"])
    elif critic is not None:
        for name, (_, path) in reward_model_names(recipe).items():
            if path == recipe.critic.path:
                share_frozen(models.frozen[name], critic)


def _counted(model: nn.Module, seen: set[int]) -> Weights:
    counts = {"trained": 0, "trained_bytes": 0, "frozen": 0, "frozen_bytes": 0, "shared_bytes": 0}
    own, packed = set(), packed_sizes(model)
    for tensor in (*model.parameters(), *model.buffers()):
        place = tensor.untyped_storage()._cdata
        if place in own:
            continue
        own.add(place)
        kind = "trained" if tensor.requires_grad else "frozen"
        if place in seen:
            counts["shared_bytes"] += tensor.nbytes
        else:
            counts[kind] += packed.get(id(tensor), tensor.numel())
            counts[f"{kind}_bytes"] += tensor.nbytes
    seen |= own
    return Weights(**counts)
