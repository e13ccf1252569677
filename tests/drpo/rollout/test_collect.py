"""One batch of rollouts by a real tiny model: what is forced, what is sampled, what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import tiny_model

from drpo.data.encode import Example
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.models.actor_critic import ActorCritic
from drpo.models.scalar_head import ScalarModel
from drpo.models.scoring import response_logprobs
from drpo.models.tokenizer import train_tokenizer
from drpo.reward_functions import call_reward_fn
from drpo.rewards import Completion
from drpo.rollout.collect import collect
from drpo.rollout.generator import Generator, RolloutConfig, vocabulary_of
from drpo.rollout.held_out import EvalConfig, evaluate
from drpo.rollout.resets import ResetConfig
from drpo.rollout.sampler import SamplingConfig
from drpo.rollout.starts import Starts
from drpo.rollout.trajectory import Trajectory
from drpo.run.metrics import Phases
from drpo.trainers.online_models import OnlineModels
from drpo.trainers.ppo_update import PPOConfig

LIMIT = 9
ROLLOUT = RolloutConfig(
    batch_size=16,
    max_response_length=LIMIT,
    sampling=SamplingConfig(temperature=0.8),
    generation_batch_size=5,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three. four five!\n"], 270)


@pytest.fixture(scope="module")
def models(tokenizer) -> tuple[ActorCritic, torch.nn.Module]:
    """An actor-critic that often stops, over 8 ids more than the tokenizer has; and a reference."""
    policy, reference = (tiny_model("gpt_neox", seed=seed, vocab_size=len(tokenizer) + 8) for seed in (0, 1))
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    actor_critic = ActorCritic(
        policy,
        ScalarModel.from_causal_lm(policy, seed=2),
        temperature=0.8,
        suppressed_ids=vocabulary.suppressed_ids,
    )
    return actor_critic, reference


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Example]:
    texts = [" one", " two three", " four five! one two", " three. one five! two three. four"]
    return [
        Example(
            Record(prompt=f"post{i}", completion=text, origin=f"posts.jsonl:{i}"),
            query_ids=tokenizer(f"post{i}").input_ids,
            completion_ids=[*tokenizer(text).input_ids, tokenizer.eos_token_id],
        )
        for i, text in enumerate(texts)
    ]


def by_length(completions: Sequence[Completion]) -> list[float]:
    return [float(len(c.response_ids)) for c in completions]


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)


@pytest.fixture
def generator(models, tokenizer) -> Generator:
    policy = models[0].policy
    vocabulary = vocabulary_of(tokenizer, policy.config.vocab_size)
    batch_size = ROLLOUT.generation_batch_size
    return Generator(policy, tokenizer, vocabulary, ROLLOUT.sampling, LIMIT, batch_size, seed=3)


@pytest.fixture
def rollouts(models, generator, engine, examples) -> Callable[..., tuple[list, Trajectory, list[Completion]]]:
    actor_critic, reference = models

    def reference_logprobs(batch, trunk, num_continuations):
        return response_logprobs(reference, batch, temperature=0.8).logprobs

    online = OnlineModels(engine, actor_critic, actor_critic, generator, reference_logprobs, notes=[])

    def roll_out(episodes: range, **reset) -> tuple[list, Trajectory, list[Completion]]:
        drawing = Starts(examples, ResetConfig(**reset), ROLLOUT, generator, 3, online.sample_initial)
        starts = drawing.draw(episodes, 0.0)
        rollouts, completions = collect(starts, generator, engine, by_length, 1, Phases())
        config = PPOConfig(microbatch_tokens=40)
        return starts, online.measure(rollouts, config, (3, 1)), completions

    return roll_out


# --- tokens -----------------------------------------------------------------------------------------------


def test_forced_tokens_are_the_beginning_of_the_reference(rollouts):
    starts, trajectory, _ = rollouts(range(64))
    assert int(trajectory.is_reset.sum()) > 20
    for row, start in enumerate(starts):
        h = int(trajectory.reset_lengths[row])
        assert trajectory.responses[row, :h].tolist() == start.example.completion_ids[:h]
        assert int(trajectory.source_lengths[row]) == (len(start.example.completion_ids) if h else 0)


def test_rollouts_that_share_a_state_prefill_it_once(generator, examples):
    whole = dataclasses.replace(generator, batch_size=8)
    rollout = dataclasses.replace(ROLLOUT, rollouts_per_prompt=4)
    rows = {}
    for per in ("prompt", "rollout"):
        reset = ResetConfig(per=per, min_length=1)
        starts = Starts(examples, reset, rollout, generator, 3, None).draw(range(8), 0.0)
        seen: list[int] = []
        handle = generator.policy.register_forward_pre_hook(
            lambda module, args, inputs, seen=seen: seen.append(inputs["input_ids"].shape[0]),
            with_kwargs=True,
        )
        completions = whole.respond(starts)
        handle.remove()
        assert len(completions) == 8
        assert len({tuple(c.response_ids) for c in completions}) > 2  # sampled apart
        rows[per] = seen[0], len({(start.example.record.prompt, start.prefix) for start in starts})
    assert rows["prompt"] == (2, 2)
    assert rows["rollout"][0] == rows["rollout"][1] > 2


def test_the_policy_writes_at_least_one_token_and_stays_within_the_limit(rollouts):
    _, trajectory, _ = rollouts(range(64))
    assert bool((trajectory.lengths > trajectory.reset_lengths).all())
    assert int(trajectory.lengths.max()) == LIMIT
    assert trajectory.responses.shape == (64, LIMIT)  # the longest of all processes
    assert trajectory.queries.shape == (64, 5)


def test_a_rollout_ends_at_its_stop_token_or_at_the_limit(rollouts, tokenizer):
    _, trajectory, completions = rollouts(range(64))
    for row, completion in enumerate(completions):
        ids = trajectory.responses[row][trajectory.response_mask[row]].tolist()
        assert ids == completion.response_ids
        assert completion.ended == (ids[-1] == tokenizer.eos_token_id) == bool(trajectory.ended[row])
        assert tokenizer.eos_token_id not in ids[:-1]
        assert completion.ended or len(ids) == LIMIT
    assert {c.ended for c in completions} == {True, False}


def test_padding_and_ids_without_a_token_are_never_sampled(rollouts, tokenizer):
    _, trajectory, _ = rollouts(range(64))
    sampled = trajectory.responses[trajectory.action_mask]
    assert tokenizer.pad_token_id not in sampled
    assert int(sampled.max()) < len(tokenizer)


def test_reward_functions_see_the_whole_response_as_text(rollouts, tokenizer):
    starts, trajectory, completions = rollouts(range(32))
    for start, completion in zip(starts, completions, strict=True):
        assert completion.prompt == start.example.record.prompt
        assert completion.query_ids == start.example.query_ids
        assert completion.response.startswith(tokenizer.decode(list(start.prefix[:-1])))
        assert "<|endoftext|>" not in completion.response
    assert trajectory.scores.tolist() == [float(len(c.response_ids)) for c in completions]


def test_a_rollout_depends_on_its_episode_alone(rollouts):
    """Other neighbours, other batches: the same rows. This is what makes the number of processes irrelevant."""
    _, whole, _ = rollouts(range(16))
    for episodes in (range(0, 8), range(8, 16)):
        _, part, _ = rollouts(episodes)
        rows = slice(episodes.start, episodes.stop)
        for field in dataclasses.fields(Trajectory):
            if not isinstance(getattr(whole, field.name), torch.Tensor):
                continue
            mine, theirs = getattr(part, field.name), getattr(whole, field.name)[rows]
            assert torch.allclose(mine, theirs, atol=1e-5) if mine.is_floating_point() else mine.equal(theirs)


# --- measurements -----------------------------------------------------------------------------------------


def test_measurements_are_those_of_each_row_alone(rollouts, models, tokenizer):
    """Row by row, without padding or masks, on the logits of the whole model."""
    actor_critic, reference = models
    starts, trajectory, completions = rollouts(range(12))
    never = [tokenizer.pad_token_id, *range(len(tokenizer), actor_critic.policy.config.vocab_size)]
    for row, (start, completion) in enumerate(zip(starts, completions, strict=True)):
        ids = torch.tensor([[*start.example.query_ids, *completion.response_ids]])
        first, last = len(start.example.query_ids) - 1, ids.shape[1] - 1
        targets = ids[0, first + 1 :, None]
        with torch.no_grad():
            logits = actor_critic.policy(ids).logits[0, first:last].double() / 0.8
            logits[:, never] = -torch.inf
            logprobs = logits.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1)
            ref_logprobs = (reference(ids).logits[0, first:last].double() / 0.8).log_softmax(-1)
            values = actor_critic.critic(ids)[0, first:last]
        length = len(completion.response_ids)
        for measured, expected in (
            (trajectory.logprobs, logprobs.gather(1, targets)[:, 0]),
            (trajectory.ref_logprobs, ref_logprobs.gather(1, targets)[:, 0]),
            (trajectory.entropy, entropy),
            (trajectory.values, values),
        ):
            assert torch.allclose(measured[row, :length], expected.float(), atol=1e-4)


def test_without_resets_nothing_is_forced(rollouts):
    _, trajectory, _ = rollouts(range(8), proportion=0.0)
    assert not trajectory.reset_lengths.any() and not trajectory.source_lengths.any()
    assert torch.equal(trajectory.action_mask, trajectory.response_mask)


# --- reward functions -------------------------------------------------------------------------------------


def test_a_reward_function_may_return_a_tensor_or_a_list(rollouts):
    _, _, completions = rollouts(range(3))
    for returned in ([1, 2, 3], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)):
        scores = call_reward_fn(lambda _, returned=returned: returned, completions)
        assert scores.dtype == torch.float32 and not scores.requires_grad
        assert scores.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("returned", [[1.0], [[1.0], [2.0], [3.0]], 1.0])
def test_a_reward_function_that_returns_another_number_of_scores_is_an_error(rollouts, returned):
    _, _, completions = rollouts(range(3))
    with pytest.raises(ValueError, match="for 3 completions; it must return one number each"):
        call_reward_fn(lambda _: returned, completions)


# --- vocabulary -------------------------------------------------------------------------------------------


def test_stop_and_bad_tokens(tokenizer):
    ids = tokenizer.get_vocab()
    policy_stops = [ids["!"], tokenizer.pad_token_id, tokenizer.eos_token_id, ids["."], len(tokenizer) + 5]
    vocabulary = vocabulary_of(tokenizer, len(tokenizer) + 2, policy_stops, ["."])
    assert vocabulary.stop_ids == (tokenizer.eos_token_id, ids["!"])  # the others are never sampled
    assert set(vocabulary.suppressed_ids) == {
        tokenizer.pad_token_id,
        ids["."],
        len(tokenizer),
        len(tokenizer) + 1,
    }
    plain = vocabulary_of(tokenizer, len(tokenizer))
    assert plain.stop_ids == (tokenizer.eos_token_id,)
    assert plain.suppressed_ids == (tokenizer.pad_token_id,)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bad_tokens": ["no such token"]}, r"rollout\.bad_tokens: \['no such token'\]"),
        ({"bad_tokens": ["<|endoftext|>"]}, r"share the ids"),
    ],
)
def test_tokens_that_make_no_sense_are_refused(tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        vocabulary_of(tokenizer, len(tokenizer), **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "^batch_size must be >= 1, got 0$"),
        (
            {"batch_size": 10, "rollouts_per_prompt": 4},
            r"^batch_size \(10\) must be a multiple of rollouts_per_prompt \(4\)$",
        ),
        ({"max_response_length": 0}, "^max_response_length must be >= 1, got 0$"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "^sampling.temperature must be > 0: greedy"),
        (
            {"sampling": SamplingConfig(top_k=50)},
            r"^sampling.top_k must be 0, got 50: .* narrower .* use sampling.temperature$",
        ),
        (
            {"sampling": SamplingConfig(top_p=0.9)},
            r"^sampling.top_p must be 1, got 0.9: ",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(models, generator, engine):
    reference = models[1]
    rewards = {"score": by_length, "twice": lambda cs: [2 * s for s in by_length(cs)]}

    def of_reference(batch):
        return response_logprobs(reference, batch, temperature=0.8).logprobs

    def run(examples, config=None, reference_logprobs=of_reference):
        config = config or EvalConfig(temperature=0.8)
        return evaluate(config, engine, generator, examples, rewards, reference_logprobs)

    return run


def test_evaluation_reports_means_over_held_out_prompts(evaluation, examples):
    metrics, rows = evaluation(examples, EvalConfig(num_prompts=3, temperature=0.8))
    assert [row["origin"] for row in rows] == [f"posts.jsonl:{i}" for i in range(3)]
    assert all(row["prefix"] == "" for row in rows)
    scores = [row["scores"]["score"] for row in rows]
    assert metrics["eval/score"] == metrics["eval/length"] == pytest.approx(sum(scores) / 3)
    assert metrics["eval/twice"] == pytest.approx(2 * metrics["eval/score"])
    assert metrics["eval/ended"] == pytest.approx(sum(row["ended"] for row in rows) / 3)


def test_the_same_seed_evaluates_on_the_same_draws(evaluation, examples):
    assert evaluation(examples) == evaluation(examples)
    fewer = evaluation(examples, EvalConfig(num_prompts=2, temperature=0.8))[1]
    assert [row["continuation"] for row in fewer] == [
        row["continuation"] for row in evaluation(examples)[1][:2]
    ]


def test_kl_to_oneself_is_zero_and_absent_without_a_reference(evaluation, examples, models, tokenizer):
    never = vocabulary_of(tokenizer, models[0].policy.config.vocab_size).suppressed_ids

    def own(batch):
        return response_logprobs(models[0].policy, batch, temperature=0.8, suppressed_ids=never).logprobs

    assert evaluation(examples, reference_logprobs=own)[0]["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    assert "eval/kl" not in evaluation(examples, reference_logprobs=None)[0]


@pytest.mark.parametrize(
    "temperature, name", [(0.8, "kl"), (0.01, "log_ratio"), (0.0, "log_ratio"), (1.0, "log_ratio")]
)
def test_log_ratio_is_called_kl_only_at_the_temperature_it_is_taken_at(
    evaluation, examples, temperature, name
):
    metrics, rows = evaluation(examples, EvalConfig(temperature=temperature))  # rollouts: 0.8
    assert {"eval/kl", "eval/log_ratio"} & metrics.keys() == {f"eval/{name}"}
    assert name in rows[0]["scores"]


def test_no_held_out_prompts_is_an_error_that_says_what_to_set(evaluation):
    with pytest.raises(ValueError, match=r"no held-out prompts.*data\.eval_fraction.*eval\.every=0"):
        evaluation([])
