"""Evaluate reward models, or preference-trained policies, on pairs: numbers, a page and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from drpo.config import ConfigError, save_resolved
from drpo.data.encode import Example
from drpo.engine import Engine, EngineConfig
from drpo.jsonl import write_whole
from drpo.versions import git_commit, package_versions
from eval.progress import Say
from eval.reward_models.best_of_k import ChoiceRow, best_of_k, read_choices
from eval.reward_models.best_of_n import Samples, best_of_n, sample
from eval.reward_models.ensembles import check_ensembles, measure_ensembles
from eval.reward_models.measure import measure_pairs, measure_references, plain
from eval.reward_models.models import LoadedModel, load_scored_model
from eval.reward_models.pairs import (
    ScoredPairs,
    choose_pairs,
    invariance,
    load_split,
    score_pairs,
    texts_sha256,
)
from eval.reward_models.plots import plot_all
from eval.reward_models.recipe import EvaluateRewardModelRecipe, ScoredModel
from eval.reward_models.report import FILE, write_report
from eval.statistics.score_summary import accuracy_over_seeds, model_agreement


def evaluate_reward_model(recipe: EvaluateRewardModelRecipe, say: Say = print) -> Path:
    """Score the pairs with every model, measure, and write the results to `run_dir`.

    Writes evaluation.json, its pages evaluation.html and evaluation.md, pairs.jsonl (the scores of every pair), plots
    and config.yaml; returns the path of evaluation.html. Raises ConfigError or DataError for inputs that cannot be
    read, and where the models do not read the same pairs.
    """
    if not recipe.models:
        raise ConfigError(
            "models must name at least one reward model: models=[{path: runs/reward_model/reward_model}]"
        )
    check_ensembles(recipe)
    folder = Path(recipe.run_dir)
    engine = Engine(
        EngineConfig(mixed_precision=recipe.mixed_precision, trackers=[]), folder, 0, max_grad_norm=None
    )
    recipe = replace(recipe, mixed_precision=engine.precision)  # null resolved for this machine
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    choices, choices_name = ([], None) if recipe.best_of_k is None else read_choices(recipe.best_of_k)
    samples = None if recipe.best_of_n.policy is None else sample(recipe, engine, say)
    results, scored, facts = [], {}, None
    for model in recipe.models:
        loaded = load_scored_model(model, recipe, engine)
        result, pairs, examples, report = _evaluate(loaded, recipe, choices, say)
        del loaded  # one model is in memory at a time
        if samples is not None:
            result["best_of_n"] = _best_of_n(model, recipe, engine, samples)
        own = _data_facts(recipe, examples, report)
        facts = _same_pairs(facts, own, model.label)
        results.append(result)
        scored[model.label] = pairs
        _say_accuracy(result, say)
    evaluation = {
        "created_by": {"commit": git_commit(), "versions": package_versions()},
        "data": {**facts, "best_of_k": choices_name},
        "confidence": recipe.confidence,
        "precision": {
            "dtype": recipe.dtype,
            "mixed_precision": engine.precision,
            "device": engine.device.type,
        },
        "models": results,
        "ensembles": measure_ensembles(recipe, examples, scored),
        **_together(scored, recipe.confidence),
    }
    write_whole(folder / FILE, json.dumps(evaluation, indent=1, allow_nan=False) + "\n")
    _write_pairs(folder / "pairs.jsonl", examples, scored)
    plot_all(evaluation, scored, recipe.num_bins, folder)
    path = write_report(evaluation, folder)
    engine.close()
    return path


def _evaluate(
    loaded: LoadedModel,
    recipe: EvaluateRewardModelRecipe,
    choices: list[ChoiceRow],
    say: Say,
) -> tuple[dict[str, Any], ScoredPairs, list[Example], str]:
    """Measure one model; return the result, the scored pairs, their examples and the report on the data."""
    examples, report = load_split(recipe, loaded.tokenizer, "pairs")
    examples = choose_pairs(examples, recipe.num_pairs)
    pairs = score_pairs(loaded, examples, say)
    result = {
        "name": loaded.label,
        **loaded.facts,
        **measure_pairs(recipe, examples, pairs),
        "references": measure_references(recipe, loaded),
        "invariance": invariance(loaded, examples, pairs, recipe.num_alone),
        "best_of_k": best_of_k(recipe, loaded, choices) if choices else None,
        "best_of_n": None,
    }
    return plain(result), pairs, examples, report


def _best_of_n(
    model: ScoredModel, recipe: EvaluateRewardModelRecipe, engine: Engine, samples: Samples
) -> dict[str, Any]:
    """Load the model again, as a reader of the policy's tokens, and compute its curves."""
    loaded = load_scored_model(model, recipe, engine, recipe.best_of_n.policy)
    return best_of_n(loaded, samples, recipe.confidence)


def _data_facts(
    recipe: EvaluateRewardModelRecipe, examples: Sequence[Example], report: str
) -> dict[str, Any]:
    return {
        "task": recipe.data.task,
        "path": recipe.data.path,
        "split": recipe.split,
        "num_pairs": len(examples),
        "num_prompts": len({example.record.shared_prompt for example in examples}),
        "pairs_sha256": texts_sha256(examples),
        "report": report,
    }


def _same_pairs(first: dict[str, Any] | None, own: dict[str, Any], label: str) -> dict[str, Any]:
    """Return the facts of the first model's data. Raises ConfigError if another model reads other pairs."""
    if first is not None and first["pairs_sha256"] != own["pairs_sha256"]:
        raise ConfigError(
            f"models: {label} reads other pairs than the first model ({own['num_pairs']} and {first['num_pairs']}): "
            "their tokenizers cut, or leave out, different texts at data.max_prompt_length or "
            "data.max_response_length; raise these, or evaluate the models apart"
        )
    return first or own


def _together(scored: Mapping[str, ScoredPairs], confidence: float) -> dict[str, Any]:
    """Compare the models with each other."""
    margins = {label: pairs.margins for label, pairs in scored.items()}
    prompt_ids = next(iter(scored.values())).prompt_ids
    return plain(
        {
            "agreement": model_agreement(margins, prompt_ids, confidence),
            "accuracy_over_models": accuracy_over_seeds(margins, prompt_ids, confidence),
        }
    )


def _say_accuracy(result: Mapping[str, Any], say: Say) -> None:
    accuracy = result["accuracy"]
    interval = accuracy["accuracy"]
    say(
        f"{result['name']}: accuracy {interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}] on "
        f"{accuracy['n']} pairs, {accuracy['ties']} of them ties"
    )


def _write_pairs(path: Path, examples: Sequence[Example], scored: Mapping[str, ScoredPairs]) -> None:
    """Write a line for each pair: its origin, and scores and lengths of both responses by model."""
    lines = []
    for index, example in enumerate(examples):
        models = {
            label: {
                name: np.asarray(getattr(pairs, name))[index].item()
                for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
            }
            for label, pairs in scored.items()
        }
        prompt_id = next(iter(scored.values())).prompt_ids[index]
        lines.append(
            json.dumps({"origin": example.record.origin, "prompt_id": prompt_id, "models": models}) + "\n"
        )
    write_whole(path, "".join(lines))
