"""Sample, measure and judge each run of a comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.config import ConfigError
from drpo.data.records import DataError
from drpo.data.stop import with_stop_token
from drpo.engine import Engine
from drpo.models.model_folder import read_config
from drpo.models.tokenizer import load_tokenizer
from drpo.rewards import RewardFn
from drpo.rollout.sampler import SamplingConfig
from drpo.run.metrics import read_metrics
from eval.comparing.recipe import SystemConfig
from eval.comparing.systems import KL, WIN_RATE, Run, judged_values, text_values
from eval.completions.complete import check_references, complete_policy, load_to_read, requests_of
from eval.completions.fixed_systems import reference_rows
from eval.completions.imported import file_sha256
from eval.completions.recipe import CompleteRecipe
from eval.completions.response_scores import response_kls, reward_scores
from eval.completions.rows import (
    REFERENCE,
    CompletionRow,
    load_completions,
    messages_meta,
    read_completions,
    read_meta,
)
from eval.completions.sample import map_sharded, open_file, vocabulary_with, with_num_tokens
from eval.judging.judge_systems import JudgeRecipe, judge
from eval.judging.judgments import read_answers, read_verdicts
from eval.judging.verdict import combine_all
from eval.progress import Say
from eval.statistics.across_runs import Values

SAMPLED = SamplingConfig(temperature=1.0)
NUM_ROLLOUTS = 8
COMPLETIONS = "completions.jsonl"


def check_systems(systems: Sequence[SystemConfig], kl_reference: str | None) -> None:
    """Raise ConfigError or DataError, naming the key, for inputs that cannot be read, before any sampling."""
    for place, system in enumerate(systems):
        for path in system.completions:
            _rows_of(path, system.name)
        for index, policy in enumerate(system.policies):
            vocabulary = _vocabulary(policy, f"systems[{place}].policies[{index}]")
            key, reference = "kl_reference", kl_reference
            if system.kl_references:
                key, reference = f"systems[{place}].kl_references[{index}]", system.kl_references[index]
            if reference is not None and _vocabulary(reference, key) != vocabulary:
                raise ConfigError(
                    f"no KL of {policy} to {key}={reference}: their tokenizers differ; leave it out, or name a "
                    "reference with the same tokenizer"
                )


def asked_prompts(
    recipe: CompleteRecipe, systems: Sequence[SystemConfig], baseline: str, judged: bool
) -> dict[str, dict[str, Any]] | None:
    """Return the `meta` that rows keep of each prompt asked of the policies, by prompt id; None without policies.

    Raises ConfigError where the baseline is the dataset's responses and there are none, DataError for a file of
    responses that is to be judged and lacks prompts.
    """
    policy = next((policy for system in systems for policy in system.policies), None)
    if policy is None:
        return None
    requests, _ = requests_of(replace(recipe, policy=policy), load_tokenizer(policy))
    if baseline == REFERENCE:
        check_references(requests, f"baseline={REFERENCE}")
    prompts = {request.prompt_id: messages_meta(request.example.record) for request in requests}
    for system in systems:
        for path in system.completions:
            lacking = len(prompts.keys() - {row.prompt_id for row in _rows_of(path, system.name)})
            if judged and lacking:
                raise DataError(
                    f"{path} has no response of {system.name} to {lacking} of the {len(prompts)} prompts that the "
                    "policies are asked (complete.data, complete.num_prompts)"
                )
    return prompts


def _vocabulary(path: str, key: str) -> dict[str, int]:
    """Return the vocabulary of the tokenizer at a folder or hub id that must also contain a model."""
    read_config(path, key)
    return load_tokenizer(path, key).get_vocab()


def check_runs_differ(name: str, runs: Sequence[Run]) -> None:
    """Raise ConfigError when runs of a system share their weights, as they would count as several training seeds."""
    seen: dict[Any, str] = {}
    for run in runs:
        weights = run.hashes.get("weights_sha256")
        if weights is not None and seen.setdefault(weights, run.source) != run.source:
            raise ConfigError(
                f"systems: {name}: {seen[weights]} and {run.source} hold the same weights; name each run once"
            )


# --- responses and their measures -----------------------------------------------------------------------


def run_of_policy(
    recipe: CompleteRecipe, engine: Engine, kl_reference: str | None, rewards: dict[str, RewardFn], say: Say
) -> Run:
    """Sample and measure the responses of the recipe's policy; all processes must call it.

    Args:
        recipe: Policy and sampling settings.
        engine: Engine whose processes share the work.
        kl_reference: Policy that the KL is measured to; None for no KL.
        rewards: Reward functions by name.
        say: Receives progress and notes.
    """
    path = complete_policy(recipe, engine, say)
    rows = read_completions(path)
    sampled = recipe.sampling == SAMPLED
    values = measured_values(engine, rows, rewards)
    if kl_reference is not None:
        samples = rows
        if not sampled:
            folder = str(Path(recipe.run_dir) / "sampled")
            at_one = replace(recipe, run_dir=folder, sampling=SAMPLED, num_responses=1)
            samples = read_completions(complete_policy(at_one, engine, say))
        values[KL] = _kls(recipe, engine, samples, kl_reference, say)
    meta = read_meta(path)
    hashes = {name: value for name, value in meta.items() if name.endswith("_sha256") and value}
    config, rollouts = _training_run(recipe.policy)
    return Run(recipe.policy, rows, values, sampled=sampled, hashes=hashes, config=config, rollouts=rollouts)


def run_of_file(
    path: str,
    name: str,
    folder: Path,
    engine: Engine,
    rewards: dict[str, RewardFn],
    prompts: Mapping[str, Mapping[str, Any]] | None,
    say: Say,
) -> Run:
    """Read the responses of system `name` from an existing file, and copy them to `folder`.

    Args:
        path: File of completions.
        name: System whose rows are read.
        folder: Destination of the rows, where the judge reads them.
        engine: Engine whose processes share the measuring.
        rewards: Reward functions by name.
        prompts: Their `meta` by prompt id; rows of other prompts are dropped and counted. None keeps all rows.
        say: Receives that count.
    """
    rows = _rows_of(path, name)
    num_rows = len(rows)
    if prompts is not None:  # a model with a chat template must read the same turns as in the policies' rows
        rows = [
            replace(row, meta={**row.meta, **prompts[row.prompt_id]})
            for row in rows
            if row.prompt_id in prompts
        ]
    if engine.is_main and (num_dropped := num_rows - len(rows)):
        say(f"{path}: {num_dropped} of {num_rows} responses are to prompts that the policies are not asked")
    hashes = {"file_sha256": file_sha256(path)}
    keep_rows(engine, rows, folder, {**hashes, "system": name})
    return Run(path, rows, measured_values(engine, rows, rewards), sampled=False, hashes=hashes)


def _rows_of(path: str, name: str) -> list[CompletionRow]:
    all_rows = load_completions([path])
    rows = [row for row in all_rows if row.system == name]
    if not rows:
        known = ", ".join(sorted({row.system for row in all_rows}))
        raise DataError(f"{path} has no responses of system {name!r}; there are: {known}")
    return rows


def run_of_references(
    runs: Sequence[Run], policy: str | None, folder: Path, engine: Engine, rewards: dict[str, RewardFn]
) -> Run:
    """Return the dataset's own responses to the prompts of all `runs`, measured.

    Args:
        runs: Runs whose rows contain the references.
        policy: Policy whose tokenizer counts the tokens; None counts none.
        folder: Destination of the rows.
        engine: Engine whose processes share the measuring.
        rewards: Reward functions by name.
    """
    rows = reference_rows([row for run in runs for row in run.rows])
    if policy is not None:
        rows = with_num_tokens(rows, load_tokenizer(policy))
    keep_rows(engine, rows, folder, {"system": REFERENCE, "policy": policy, "num_prompts": len(rows)})
    return Run("the dataset", rows, measured_values(engine, rows, rewards), sampled=False)


def keep_rows(engine: Engine, rows: Sequence[CompletionRow], folder: Path, meta: dict[str, Any]) -> None:
    """Write rows made elsewhere to `folder`, where the judge reads those of every run.

    The file is overwritten, so rows of an earlier source never mix with these.
    """
    if engine.is_main:
        (folder / COMPLETIONS).unlink(missing_ok=True)
    writer, _ = open_file(engine, folder / COMPLETIONS, meta)
    if writer is not None:
        writer.write(rows)
    engine.barrier()


def measured_values(
    engine: Engine, rows: Sequence[CompletionRow], rewards: dict[str, RewardFn]
) -> dict[str, Values]:
    """Compute rewards and text metrics; the rewards' rows are sharded over the processes."""
    prompt_ids = tuple(row.prompt_id for row in rows)
    values = text_values(rows)
    for name, reward in rewards.items():
        try:
            scores = np.array(map_sharded(engine, partial(reward_scores, reward), rows))
        except ConfigError:
            raise
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error
        values[name] = Values(prompt_ids, scores)
    return values


def _kls(
    recipe: CompleteRecipe, engine: Engine, rows: Sequence[CompletionRow], kl_reference: str, say: Say
) -> Values:
    tokenizer = with_stop_token(load_tokenizer(recipe.policy), recipe.data)
    policy, reference = (
        engine.place(load_to_read(recipe, path, tokenizer), as_trained=False)
        for path in (recipe.policy, kl_reference)
    )
    suppressed_ids = vocabulary_with(recipe.bad_tokens, tokenizer, policy).suppressed_ids

    def kls_of(share: list[CompletionRow]) -> NDArray[np.float64]:
        return response_kls(policy, reference, tokenizer, share, recipe.batch_size, suppressed_ids, say)

    with engine.frozen_autocast():
        kls = np.array(map_sharded(engine, kls_of, rows))
    return Values(tuple(row.prompt_id for row in rows), kls)


def _training_run(policy: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the recipe and last rollouts of the training run that wrote the policy, if in its parent folder."""
    folder = Path(policy).parent
    if not (Path(policy).is_dir() and (folder / "metrics.jsonl").is_file()):
        return None, []
    config, samples = folder / "config.yaml", folder / "samples.jsonl"
    rollouts = []
    if samples.is_file():
        step = re.search(r"_step_(\d+)$", Path(policy).name)  # written by checkpoint.model_every
        max_step = int(step[1]) if step else math.inf
        rollouts = [
            row for row in read_metrics(samples) if row.get("split") == "rollout" and row["step"] <= max_step
        ]
        last = max((row["step"] for row in rollouts), default=None)
        rollouts = [row for row in rollouts if row["step"] == last][:NUM_ROLLOUTS]
        names = ("step", "prompt", "prefix", "continuation", "ended", "scores")
        rollouts = [{name: row[name] for name in names} for row in rollouts]
    return (config.read_text(encoding="utf-8") if config.is_file() else None), rollouts


# --- the judge ------------------------------------------------------------------------------------------


def judge_run(recipe: JudgeRecipe, run: Run, say: Say) -> Run:
    """Return `run` with the verdicts of the judge's recipe, which must be on its system."""
    path = judge(recipe, say)
    verdicts = read_verdicts(path)
    judgments = combine_all(verdicts, recipe.half_tie, recipe.orders)
    values = {**run.values, WIN_RATE: judged_values(judgments)}
    return replace(run, values=values, verdicts=verdicts, judgments=judgments, answers=read_answers(path))
