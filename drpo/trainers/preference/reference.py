"""The initial reference policy of preference training."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from drpo.engine import Engine
from drpo.models.loading import load_policy
from drpo.models.trunk import share_trunk
from drpo.models.vocabulary import check_same_vocabulary
from drpo.trainers.preference.recipe import PreferenceRecipe
from drpo.trainers.reference import AdapterOff, FrozenCopy, can_share_trunk


def starting_reference(
    recipe: PreferenceRecipe, engine: Engine, tokenizer, policy: nn.Module
) -> AdapterOff | FrozenCopy:
    """Return the initial reference: the policy at reference.path, else the policy itself.

    Raises ConfigError when reference.path holds no policy for this tokenizer.
    """
    model, path = recipe.model, recipe.reference.path
    if recipe.reference_is_adapter_off:
        if recipe.reference.cache_dir is not None or recipe.orders_by_reference:
            engine.hold_frozen(policy)
            policy.to(engine.device)  # it scores before training changes it
        return AdapterOff(policy)
    source = model.without_adapter(gradient_checkpointing=False)
    if path is not None:
        check_same_vocabulary(tokenizer, path, "reference.path")
        source = replace(
            source, path=path, architecture={}, tokenizer=None, vocab_size=None, trainable_layers=None
        )
    # A reference that takes small steps needs float32: in bfloat16 they would be rounded away.
    takes_small_steps = recipe.reference.sync_mix < 1
    if takes_small_steps:
        source = replace(source, dtype="float32")
    key = "model.path" if path is None else "reference.path"
    copy = load_policy(source, tokenizer, recipe.seed, key)
    if takes_small_steps:
        copy = copy.to(engine.device).eval().requires_grad_(False)
    else:
        copy = engine.place(copy, as_trained=True)
    dtypes = {module.get_input_embeddings().weight.dtype for module in (copy, policy)}
    shares_trunk = can_share_trunk(policy, engine.partitions_weights) and path is None and len(dtypes) == 1
    if shares_trunk:
        share_trunk(copy, policy.to(engine.device))  # it may score before training changes the policy
    return FrozenCopy(copy, shares_trunk)
