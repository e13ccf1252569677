"""Measure how training changed a policy's MLPs: each neuron's part of the shift along a probe direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.config import ConfigError, Section, key, refuse, refuse_changed, save_resolved, setting
from drpo.data.load import DataConfig, load_examples
from drpo.data.stop import with_stop_token
from drpo.models.loading import ModelConfig, load_policy
from drpo.models.model_folder import read_config
from drpo.models.policy_stops import stop_ids
from drpo.models.positions import check_lengths
from drpo.models.tokenizer import load_tokenizer
from drpo.reward_functions import call_reward_fn, import_functions
from drpo.rewards import RewardFn
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Start
from eval.neurons.mlp_neurons import mean_activations, num_neurons
from eval.neurons.neuron_edits import EditConfig, intervene
from eval.neurons.neuron_report import page, plot_layers, save_arrays, save_summary, written_summary
from eval.neurons.neuron_shift import NeuronShift, align, noise_gross, summarise
from eval.neurons.probe import Probe, fit_probe, load_probe, mean_hidden_states, probe_quality, save_probe
from eval.neurons.probe_texts import ProbeConfig, load_probe_texts
from eval.progress import Say


@dataclass(frozen=True)
class NeuronShiftRecipe(Section):
    """Two policies, a probe direction, and the prompts on which their neurons are compared."""

    run_dir: str = "runs/neuron_shift"
    """Folder of the results."""
    before: str | None = None
    """The policy before training: folder, hub id or GGUF file; its value vectors and, where none is given, probe."""
    after: str | None = None
    """The policy after training, of the same architecture, size and vocabulary."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of both policies; sums over positions are float64 always."""
    seed: int = 0
    """Seed of the sampled continuations."""
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "eval"] = "eval"
    """Which split of the data the prompts are from; eval are the held-out ones."""
    num_prompts: int = setting(256, ge=2)
    """The first this many prompts; all if there are fewer."""
    num_new_tokens: int = setting(20, ge=1)
    """The most tokens of a continuation, stop token included."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """Temperature (0 is greedy), top_k, top_p of the continuations."""
    continuations: Literal["own", "before"] = "own"
    """own: each policy is recorded on what it writes itself; before: both on what the policy before training writes,
    so that only the weights differ."""
    batch_size: int = setting(32, ge=1)
    """Prompts or texts at a time."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    interventions: bool = True
    """Continue the prompts with each group of neurons patched to its mean after training, and with the edit below."""
    edit: EditConfig = field(default_factory=EditConfig)
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Further measurements of what the policies write, name: module:function."""

    def check(self) -> None:
        rule = f"can be demo for {key('data.task')}=demo only, got {self.data.task}"
        refuse(self.probe.source == "demo" and self.data.task != "demo", "probe.source", rule)
        if not self.interventions:
            refuse_changed(self, ["edit"], f"does not apply to {key('interventions')}=false")
        for name in self.reward_functions:
            taken = name in ("probe_logit", "length")
            refuse(taken, f"reward_functions.{name}", "is the name of another measurement; choose another")


def neuron_shift(recipe: NeuronShiftRecipe, say: Say = print) -> Path:
    """Fit the probe, record both policies, and write each neuron's shift and the effect of patching the groups."""
    for name, path in (("before", recipe.before), ("after", recipe.after)):
        if path is None:
            raise ConfigError(f"{name} must name a policy: a folder or hub id")
        read_config(path, name)  # reports a missing policy under its key
    rewards = import_functions(recipe.reward_functions, "reward_functions")
    tokenizer = _shared_tokenizer(recipe)
    splits = load_examples(recipe.data, tokenizer, "prompts")
    examples = (splits.train if recipe.split == "train" else splits.eval)[: recipe.num_prompts]
    if len(examples) < 2:
        raise ConfigError(f"split={recipe.split} has {len(examples)} prompts; two or more are needed")
    queries = [example.query_ids for example in examples]
    starts = [Start(row, example) for row, example in enumerate(examples)]

    def continue_prompts(generator: Generator) -> list[list[int]]:
        return [completion.response_ids for completion in generator.respond(starts)]

    lengths = [len(query) + recipe.num_new_tokens for query in queries]
    remedy = "set data.max_prompt_length, or lower num_new_tokens"
    generator = _load(recipe, recipe.before, tokenizer, say)
    policy = generator.policy
    for note in check_lengths(policy, lengths, "before", remedy):
        say(note)
    shape = num_neurons(policy)
    probe, quality, probe_report = _probe(recipe, policy, tokenizer)
    alignments, cosines = align(policy, probe.weight)
    written = {"before": continue_prompts(generator)}
    texts = written["before"]
    halves = [mean_activations(policy, queries[i::2], texts[i::2], recipe.batch_size) for i in (0, 1)]
    sizes = [sum(map(len, texts[i::2])) for i in (0, 1)]
    before = (halves[0] * sizes[0] + halves[1] * sizes[1]) / sum(sizes)
    del policy, generator  # one policy in memory at a time

    generator = _load(recipe, recipe.after, tokenizer, say)
    shape_after = num_neurons(generator.policy)
    if shape_after != shape:
        raise ConfigError(f"after: {shape_after} (layers, neurons of a layer), but before has {shape}")
    alignments_after, _ = align(generator.policy, probe.weight)
    written["after"] = continue_prompts(generator)
    texts = written["after" if recipe.continuations == "own" else "before"]
    after = mean_activations(generator.policy, queries, texts, recipe.batch_size)
    del generator

    shift = NeuronShift(cosines, alignments, alignments_after, before, after)
    summary = {
        "policies": {"before": recipe.before, "after": recipe.after},
        "recorded_on": recipe.continuations,
        "num_prompts": len(examples),
        "num_positions": {"before": sum(sizes), "after": sum(map(len, texts))},
        "probe": quality,
        **summarise(shift),
    }
    summary["total"]["noise_gross"] = noise_gross(*halves, alignments)
    generator = _load(recipe, recipe.before, tokenizer, say)
    if recipe.interventions:
        written |= intervene(generator.policy, shift, recipe.edit, lambda: continue_prompts(generator))
    measured = {
        name: _measure(generator, probe, starts, responses, rewards) for name, responses in written.items()
    }
    summary["written"] = written_summary(measured)
    text = page(summary, [f"prompts: {len(examples)} of {recipe.split}", splits.report, probe_report])
    say(text)

    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_resolved(recipe, folder / "config.yaml")
    save_arrays(shift, folder / "neurons.npz")
    save_probe(probe, folder / "probe.npz")
    save_summary(summary, folder / "summary.json")
    (folder / "summary.md").write_text(text, encoding="utf-8")
    plot_layers(summary, folder / "layers.png")
    return folder / "summary.md"


def _shared_tokenizer(recipe: NeuronShiftRecipe) -> PreTrainedTokenizerBase:
    tokenizer = with_stop_token(load_tokenizer(recipe.before), recipe.data)
    if load_tokenizer(recipe.after).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"after: {recipe.after!r} has another vocabulary than before={recipe.before!r}")
    return tokenizer


def _load(recipe: NeuronShiftRecipe, path: str, tokenizer: PreTrainedTokenizerBase, say: Say) -> Generator:
    """Load a policy to generate with; both policies use the same random numbers."""
    say(f"loading {path}")
    policy = load_policy(ModelConfig(path=path, dtype=recipe.dtype), tokenizer)
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size, stop_ids(policy))
    sampling, length = recipe.sampling, recipe.num_new_tokens
    return Generator(policy, tokenizer, vocabulary, sampling, length, recipe.batch_size, recipe.seed)


def _probe(
    recipe: NeuronShiftRecipe, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Probe, dict[str, float] | None, str]:
    """Return the probe, its quality on held-out texts (None for one from a file), and a report."""
    config = recipe.probe
    if config.source == "file":
        return load_probe(config.path), None, f"probe from {config.path}"
    texts = load_probe_texts(config, recipe.data.demo, tokenizer, recipe.data.max_bad_fraction)
    features = mean_hidden_states(policy, texts.context_ids, texts.text_ids, recipe.batch_size)
    labels, held_out = torch.tensor(texts.labels), torch.tensor(texts.held_out)
    probe = fit_probe(features[~held_out], labels[~held_out], config.l2)
    return probe, probe_quality(probe, features[held_out], labels[held_out]), texts.report


def _measure(
    generator: Generator,
    probe: Probe,
    starts: Sequence[Start],
    responses: Sequence[list[int]],
    rewards: Mapping[str, RewardFn],
) -> dict[str, list[float]]:
    """Measure each response: probe logit (nan for an empty continuation), length, reward functions."""
    completions = generator.completions(starts, responses)
    texts = [c.response_ids[:-1] if c.ended else c.response_ids for c in completions]
    indices = [index for index, text in enumerate(texts) if text]
    logits = torch.full((len(texts),), torch.nan, dtype=torch.float64)
    if indices:
        contexts, texts = [completions[i].query_ids for i in indices], [texts[i] for i in indices]
        features = mean_hidden_states(generator.policy, contexts, texts, generator.batch_size)
        logits[indices] = probe.logits(features)
    measured = {"probe_logit": logits.tolist(), "length": [float(len(ids)) for ids in responses]}
    return measured | {name: call_reward_fn(fn, completions).tolist() for name, fn in rewards.items()}
