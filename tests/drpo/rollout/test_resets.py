"""Dataset resets: where prefixes may end, how their length is drawn, and what a draw depends on."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drpo.config import ConfigError
from drpo.data.encode import Example
from drpo.data.records import DataError, Record
from drpo.rollout.resets import (
    ResetConfig,
    allowed_lengths,
    check_resets,
    draw_reset_length,
    is_reset,
    prefix_boundaries,
    reset_response,
    scheduled,
)
from drpo.trainers.online_recipe import OnlineRecipe

NO_CHANCE = 1e-4  # p-value below which a seeded sample is called not uniform


def draw(
    config: ResetConfig, episode: int, *, source_length=9, limit=100, progress=0.0, seed=0, position=1.0
):
    """The prefix length of a rollout that may be reset, over any boundary; 0 when it is not."""
    if not is_reset(config, progress, seed, episode):
        return 0
    lengths = allowed_lengths(config, range(source_length), source_length, limit)
    return draw_reset_length(config, lengths, source_length, progress, seed, episode, position)


def draws(config: ResetConfig, number: int = 2000, **kwargs) -> list[int]:
    return [draw(config, episode, **kwargs) for episode in range(number)]


def assert_uniform_on(lengths: list[int], allowed: list[int]) -> None:
    counts = Counter(lengths)
    assert sorted(counts) == allowed
    if len(allowed) > 1:
        assert chisquare([counts[h] for h in allowed]).pvalue > NO_CHANCE


# --- how long ---------------------------------------------------------------------------------------------


def test_lengths_are_uniform_from_the_bare_prompt_to_all_but_the_last_token():
    assert_uniform_on(draws(ResetConfig(min_length=0)), [0, 1, 2, 3, 4, 5, 6, 7, 8])


def test_min_length_one_never_gives_the_bare_prompt():
    assert_uniform_on(draws(ResetConfig(min_length=1)), [1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("source_length", [1, 2, 3, 7])
@pytest.mark.parametrize("min_length", [0, 1])
def test_the_whole_response_is_never_forced(source_length, min_length):
    lengths = draws(ResetConfig(min_length=min_length), 300, source_length=source_length)
    assert max(lengths) == source_length - 1


def test_no_allowed_length_means_no_reset():
    # one token: forcing it would leave nothing to the policy
    assert set(draws(ResetConfig(min_length=1), 50, source_length=1)) == {0}
    # a minimum beyond the response
    assert set(draws(ResetConfig(min_length=9), 50, source_length=9)) == {0}


def test_fractions_bound_the_length():
    # ceil(0.25 * 9) = 3 and floor(0.7 * 9) = 6
    assert_uniform_on(draws(ResetConfig(min_fraction=0.25, max_fraction=0.7)), [3, 4, 5, 6])


def test_min_length_and_min_fraction_both_hold():
    assert min(draws(ResetConfig(min_length=5, min_fraction=0.25))) == 5
    assert min(draws(ResetConfig(min_length=1, min_fraction=0.25))) == 3


@pytest.mark.parametrize("low, high, length", [(0.07, 0.07, 100), (0.29, 0.29, 100), (0.56, 0.56, 50)])
def test_a_fraction_that_is_a_whole_number_of_tokens_allows_that_number(low, high, length):
    """0.07 * 100 is 7.000000000000001 in floating point and 0.29 * 100 is 28.999999999999996."""
    config = ResetConfig(min_fraction=low, max_fraction=high)
    assert set(draws(config, 20, source_length=length)) == {round(low * length)}


def test_a_prefix_leaves_room_for_one_sampled_token():
    assert_uniform_on(draws(ResetConfig(), source_length=9, limit=4), [0, 1, 2, 3])
    assert set(draws(ResetConfig(), 50, source_length=9, limit=1)) == {0}


def test_only_boundaries_are_drawn():
    config = ResetConfig()
    allowed = allowed_lengths(config, [0, 4, 11, 30], 30, 100)
    lengths = [draw_reset_length(config, allowed, 30, 0.0, 0, episode) for episode in range(900)]
    assert_uniform_on(lengths, [0, 4, 11])  # 30 is the whole response


def test_the_draws_of_earlier_versions_are_kept():
    """Drawn at commit 03b4e1c: a recipe of that time gives the same run."""
    uniform = ResetConfig(proportion=0.75)
    drawn = [draw(uniform, episode, source_length=20, progress=0.3, seed=5) for episode in range(12)]
    assert drawn == [0, 0, 0, 14, 9, 15, 19, 0, 1, 0, 9, 11]
    curriculum = ResetConfig(proportion=0.9, length="curriculum", min_length=1)
    drawn = [draw(curriculum, episode, source_length=20, progress=0.3, seed=5) for episode in range(12)]
    assert drawn == [13, 14, 19, 16, 13, 17, 19, 12, 9, 8, 13, 15]


# --- how often --------------------------------------------------------------------------------------------


def test_proportion_zero_is_ppo_and_one_resets_always():
    assert set(draws(ResetConfig(proportion=0.0, min_length=1), 500)) == {0}
    assert 0 not in draws(ResetConfig(proportion=1.0, min_length=1), 500)


@pytest.mark.parametrize("proportion", [0.25, 0.5, 0.8])
def test_the_share_of_resets_is_the_proportion(proportion):
    number = 4000
    lengths = draws(ResetConfig(proportion=proportion, min_length=1), number)
    share = np.mean([h > 0 for h in lengths])
    standard_error = (proportion * (1 - proportion) / number) ** 0.5
    assert abs(share - proportion) < 4 * standard_error


def test_the_length_does_not_depend_on_the_coin():
    """Bernoulli(beta) and the length are drawn apart: given a reset, the length is uniform for any beta."""
    lengths = [h for h in draws(ResetConfig(proportion=0.3, min_length=1), 6000) if h > 0]
    assert_uniform_on(lengths, [1, 2, 3, 4, 5, 6, 7, 8])


def test_a_larger_proportion_only_adds_resets():
    some = draws(ResetConfig(proportion=0.3, min_length=1), 500)
    more = draws(ResetConfig(proportion=0.7, min_length=1), 500)
    assert all(h == k for h, k in zip(some, more, strict=True) if h > 0)


# --- what a draw depends on -------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_episode_alone():
    config = ResetConfig(proportion=0.5)
    forwards = draws(config, 200)
    np.random.seed(7)
    random.seed(7)
    backwards = [draw(config, episode) for episode in reversed(range(200))]
    assert backwards[::-1] == forwards
    assert draws(config, 200, seed=1) != forwards


def test_neighbouring_seeds_and_episodes_are_unrelated():
    config = ResetConfig(min_length=1)
    lengths = np.array([draws(config, 400, seed=seed) for seed in range(4)])
    assert abs(np.corrcoef(lengths[0], lengths[1])[0, 1]) < 0.2
    assert abs(np.corrcoef(lengths[0][:-1], lengths[0][1:])[0, 1]) < 0.2
    # seed s, episode e + 1 is not seed s + 1, episode e
    assert np.mean(lengths[0][1:] == lengths[1][:-1]) < 0.3


# --- curriculum -------------------------------------------------------------------------------------------


def curriculum(progress: float, end: float = 0.5, **kwargs) -> list[int]:
    config = ResetConfig(length="curriculum", curriculum_end=end, min_length=1)
    return draws(config, 600, source_length=9, progress=progress, **kwargs)


@pytest.mark.parametrize(
    "progress, shortest",
    [
        (0.0, 8),  # only the longest of 1..8
        (0.0625, 8),  # floor(8 * 0.875) = 7 left out
        (0.125, 7),  # floor(8 * 0.75) = 6 left out
        (0.25, 5),  # half of the way: 4 left out
        (0.4375, 2),  # floor(8 * 0.125) = 1 left out
        (0.5, 1),  # from here on all
        (0.99, 1),
    ],
)
def test_curriculum_goes_from_late_to_early_prefixes(progress, shortest):
    assert_uniform_on(curriculum(progress), list(range(shortest, 9)))


def test_a_share_that_is_a_whole_number_of_lengths_leaves_that_number_out():
    """1 - 0.45 / 0.5 of 10 lengths is 1, and 0.9999999999999998 in floating point: 1 is left out."""
    config = ResetConfig(length="curriculum", curriculum_end=0.5, min_length=1)
    assert_uniform_on(draws(config, 600, source_length=11, progress=0.45), list(range(2, 11)))


def test_curriculum_keeps_the_upper_limit():
    assert set(curriculum(0.0, limit=5)) == {4}
    assert_uniform_on(curriculum(1.0, end=1.0, limit=5), [1, 2, 3, 4])


def test_uniform_does_not_depend_on_progress():
    assert draws(ResetConfig(), 100, progress=0.0) == draws(ResetConfig(), 100, progress=0.9)


# --- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, progress, factor",
    [
        ("constant", 0.9, 1.0),
        ("linear", 0.0, 1.0),
        ("linear", 0.2, 0.75),  # a quarter of the way to 0.8
        ("linear", 0.8, 0.0),
        ("linear", 0.9, 0.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.2, 0.8535533905932737),  # (1 + sqrt(1/2)) / 2
        ("cosine", 0.4, 0.5),
        ("cosine", 0.8, 0.0),
    ],
)
def test_schedules_fall_from_one_to_zero(schedule, progress, factor):
    assert scheduled(schedule, progress, 0.8) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("schedule, progress, share", [("linear", 0.25, 0.6), ("cosine", 0.5, 0.4)])
def test_the_proportion_follows_its_schedule(schedule, progress, share):
    config = ResetConfig(proportion=0.8, proportion_schedule=schedule, min_length=1)  # 0.8 * 0.75, 0.8 * 0.5
    drawn = np.mean([h > 0 for h in draws(config, 4000, progress=progress)])
    assert abs(drawn - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert set(draws(config, 200, progress=1.0)) == {0}


@pytest.mark.parametrize("progress, longest", [(0.0, 8), (0.5, 4), (0.75, 2), (0.99, 0)])
def test_the_longest_uniform_length_follows_its_schedule(progress, longest):
    config = ResetConfig(length_schedule="linear")  # ceil(9 (1 - progress)) of the lengths 0..8
    assert_uniform_on(draws(config, progress=progress), list(range(longest + 1)))


def test_a_share_that_is_a_whole_number_of_lengths_allows_that_number():
    """1 - 0.7 of 10 lengths are 3, and 3.0000000000000004 in floating point: 0, 1 and 2."""
    config = ResetConfig(length_schedule="linear")
    assert_uniform_on(draws(config, source_length=10, progress=0.7), [0, 1, 2])


@pytest.mark.parametrize(("end", "progress"), [(0.66667, 200 / 300), (1.0, 99_999 / 100_000)])
def test_the_shortest_length_is_left_until_the_schedule_ends(end, progress):
    """The cosine's factor is above 0 there, and rounds to none of the lengths 1 and 2."""
    config = ResetConfig(length_schedule="cosine", schedule_end=end, min_length=1)
    assert set(draws(config, 50, source_length=3, progress=progress)) == {1}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("length", ["uniform", "binomial"])
def test_after_its_schedule_every_rollout_starts_from_the_prompt(schedule, length):
    config = ResetConfig(length=length, length_schedule=schedule, schedule_end=0.6, min_length=2)
    assert 0 not in draws(config, 200, progress=0.59)
    assert set(draws(config, 200, progress=0.6)) == set(draws(config, 200, progress=0.9)) == {0}


def test_binomial_lengths_have_the_mean_and_the_variance_of_the_hint_lengths_of_uft():
    # p = 0.1 + (0.5 - 0.1) / 2 halfway through the cosine: L p = 12, L p (1 - p) = 8.4 for L = 40
    config = ResetConfig(length="binomial", length_schedule="cosine", min_fraction=0.1, max_fraction=0.5)
    lengths = np.array(draws(config, 4000, source_length=40, progress=0.5))
    assert abs(lengths.mean() - 12) < 4 * (8.4 / 4000) ** 0.5
    assert abs(lengths.var() - 8.4) < 4 * 8.4 * (2 / 4000) ** 0.5


def test_binomial_lengths_are_lowered_to_what_is_allowed():
    # p = 1 at the start draws 9 of 9 tokens; the last one is never forced
    falling = ResetConfig(length="binomial", length_schedule="linear")
    assert set(draws(falling, 50)) == {8}
    assert set(draws(falling, 50, limit=4)) == {3}
    allowed = allowed_lengths(falling, [0, 4, 11, 30], 30, 100)
    config = ResetConfig(
        length="binomial", max_fraction=0.5
    )  # about 15 of 30: never below 4, hardly ever below 11
    lengths = [draw_reset_length(config, allowed, 30, 0.0, 0, episode) for episode in range(200)]
    assert set(lengths) == {4, 11}
    assert lengths.count(11) > 150
    # below the shortest allowed one
    config = ResetConfig(length="binomial", max_fraction=0.001, min_length=3)
    assert set(draws(config, 20)) == {3}


def test_adaptive_lengths_lie_at_their_position_among_the_allowed_ones():
    config = ResetConfig(length="adaptive")
    assert set(draws(config, 50, position=1.0)) == {8}
    assert set(draws(config, 50, position=0.0)) == {0}
    assert set(draws(config, 50, position=0.5)) == {4}
    lengths = draws(config, 2000, position=0.4)  # 0.4 * 8 = 3.2
    assert set(lengths) == {3, 4}
    assert abs(np.mean(lengths) - 3.2) < 4 * (0.16 / 2000) ** 0.5
    assert set(draws(ResetConfig(length="adaptive", min_length=5), 50, position=0.0)) == {5}


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"curriculum_end": 0.3}, "reset.curriculum_end"),
        ({"adaptive": {"margin": 1.0}}, "reset.adaptive.margin"),
        ({"length": "adaptive", "adaptive": {"target": "score", "margin": 0.2}}, "reset.adaptive.margin"),
        ({"length": "adaptive", "adaptive": {"score": 1.0}}, "reset.adaptive.score"),
        ({"own": {"size": 3}}, "reset.own.size"),
        ({"schedule_end": 0.5}, "reset.schedule_end"),
        ({"length": "binomial", "min_fraction": 0.3}, "reset.min_fraction"),
        ({"length": "adaptive", "length_schedule": "linear"}, "reset.length_schedule"),
        ({"length": "curriculum", "length_schedule": "cosine"}, "reset.length_schedule"),
        ({"source": "own", "proportion": 0.5}, "reset.per"),
        ({"source": "own", "per": "prompt"}, "reset.proportion"),
        ({"source": "own", "proportion": 0.5, "per": "prompt", "min_fraction": 1.0}, "reset.min_fraction"),
        ({"length": "binomial"}, "reset.max_fraction"),
        ({"length": "binomial", "max_fraction": 0.0}, "reset.max_fraction"),
        ({"length": "adaptive", "adaptive": {"success": 1.0}}, "reset.adaptive.success"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, key):
    with pytest.raises(ConfigError, match=rf"^{key} "):
        OnlineRecipe(reset=settings, rollout={"rollouts_per_prompt": 2})


# --- boundaries -------------------------------------------------------------------------------------------


def bytelevel() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def tokenizer_of(*pieces: str) -> PreTrainedTokenizerFast:
    """A lossless tokenizer: bytes, and the given pieces as one token each (greedy merges, left to right)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for piece in pieces:
        ((symbols, _),) = bytelevel().pre_tokenize_str(piece)
        joined = symbols[0]
        for symbol in symbols[1:]:
            if joined + symbol not in vocab:
                merges.append((joined, symbol))
                vocab[joined + symbol] = len(vocab)
            joined += symbol
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = bytelevel()
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="[PAD]")


def encode(tokenizer, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def characters():
    return tokenizer_of()


def test_every_token_is_a_boundary_but_the_end(characters):
    ids = encode(characters, "abc")
    assert prefix_boundaries(ids, "token", characters) == [0, 1, 2, 3]  # the stop token is the fourth


def test_sentence_boundaries(characters):
    #       0123456789012345
    text = " Hi. Oh no!\nWhy? x"
    # after "." comes a space, which belongs to the sentence: " Hi. " is 5 characters
    # after "!" comes the newline, which ends a sentence too: 12; after "?" its space: 17
    assert prefix_boundaries(encode(characters, text), "sentence", characters) == [0, 5, 12, 17]


def test_a_text_that_ends_with_a_mark_may_be_forced_whole_with_the_stop_left_to_the_policy(characters):
    assert prefix_boundaries(encode(characters, "Go. No."), "sentence", characters) == [0, 4, 7]


def test_repeated_marks_end_one_sentence(characters):
    assert prefix_boundaries(encode(characters, "Oh... no"), "sentence", characters) == [0, 6]


def test_turn_boundaries(characters):
    #       12345678901234567890
    text = "One.\n\nTwo\nx\n\n\nThree"
    # blank lines after "One." (6 characters) and after "x" (14: three newlines are one break)
    assert prefix_boundaries(encode(characters, text), "turn", characters) == [0, 6, 14]


def test_a_text_without_marks_has_the_bare_prompt_alone(characters):
    assert prefix_boundaries(encode(characters, "no mark"), "sentence", characters) == [0]
    assert prefix_boundaries(encode(characters, "one.\ntwo"), "turn", characters) == [0]


def test_boundaries_count_tokens_not_characters():
    tokenizer = tokenizer_of(" yes", " no")
    ids = encode(tokenizer, " yes. no. yes")
    assert [tokenizer.decode(i) for i in ids[:-1]] == [" yes", ".", " no", ".", " yes"]
    assert prefix_boundaries(ids, "sentence", tokenizer) == [0, 2, 4]


def test_a_token_that_joins_a_mark_and_what_follows_is_not_cut():
    tokenizer = tokenizer_of(".\n", "\n\n")
    ids = encode(tokenizer, "a.\nb")
    assert len(ids) == 4  # "a", ".\n", "b", stop
    assert prefix_boundaries(ids, "sentence", tokenizer) == [0, 2]
    ids = encode(tokenizer, "a\n\nb")
    assert prefix_boundaries(ids, "turn", tokenizer) == [0, 2]


def test_a_character_of_several_tokens_is_never_cut(characters):
    ids = encode(characters, "é. ü")  # é and ü are two bytes each
    assert len(ids) == 7
    assert prefix_boundaries(ids, "sentence", characters) == [0, 4]


# --- whose response ---------------------------------------------------------------------------------------


def example(**ids) -> Example:
    scores = ids.pop("scores", ())
    record = Record(prompt="p", responses=tuple("abc"[: len(scores)]), scores=scores, origin="posts.jsonl:7")
    return Example(record, query_ids=[3], **ids)


def test_sources():
    row = example(
        completion_ids=[10, 0],
        chosen_ids=[20, 0],
        rejected_ids=[30, 0],
        ranked_ids=[[40, 0], [41, 0], [42, 0]],
        scores=(1.0, 5.0, 2.0),
    )
    assert reset_response(row, "reference") == [10, 0]
    assert reset_response(row, "chosen") == [20, 0]
    assert reset_response(row, "rejected") == [30, 0]
    assert reset_response(row, "best") == [41, 0]


@pytest.mark.parametrize("source", ["reference", "chosen", "rejected", "best"])
def test_a_missing_source_names_the_key_and_the_row(source):
    with pytest.raises(ValueError, match=rf"reset\.source={source}.*posts\.jsonl:7.*reset\.proportion=0"):
        reset_response(example(), source)


def test_an_unknown_source_is_an_error():
    with pytest.raises(ValueError, match="not one of reference, chosen, rejected, best"):
        reset_response(example(completion_ids=[1, 0]), "completion")


@pytest.mark.parametrize(
    "settings, limit",
    [
        ({"min_length": 8}, 50),  # responses of 4 to 8 tokens: the last one is never forced
        ({"max_fraction": 0.1}, 50),
        ({"min_length": 3}, 3),
    ],
)
def test_settings_that_reset_no_response_are_refused(settings, limit):
    with pytest.raises(DataError, match=r"none of 5 responses .* set reset\.proportion=0"):
        check_resets(posts(), ResetConfig(**settings), limit, None)


def test_settings_that_reset_one_response_are_taken():
    check_resets(posts(), ResetConfig(min_length=7), 50, None)
    check_resets(posts(), ResetConfig(), 2, None)


def test_a_response_is_cut_at_the_stop_token_of_the_policy_before_it_is_held_against_the_settings():
    """With 104 as a stop token, responses of 100 to 104 repeated have 4 to 7 tokens, and the last has 1."""
    check_resets(posts(), ResetConfig(min_length=7), 50, None)
    with pytest.raises(DataError, match="none of 5 responses"):
        check_resets(posts(), ResetConfig(min_length=7), 50, None, stop_ids=(104,))


def test_without_resets_no_response_is_needed():
    check_resets([example()], ResetConfig(proportion=0.0), 50, None)


def posts() -> list[Example]:
    """Five prompts with references of 4 to 8 tokens, the stop token included."""
    return [
        Example(Record(prompt=str(i)), query_ids=[i], completion_ids=[100 + i] * (3 + i) + [0])
        for i in range(5)
    ]


@pytest.mark.parametrize("source", ["own", "initial"])
def test_sources_that_are_sampled_need_no_responses_in_the_data(source):
    check_resets([example()], ResetConfig(source=source), 50, None)


# --- settings that make no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"proportion": 1.5}, "proportion"),
        ({"proportion": -0.1}, "proportion"),
        ({"min_length": -1}, "min_length"),
        ({"min_fraction": 0.6, "max_fraction": 0.5}, "min_fraction"),
        ({"max_fraction": 1.2}, "max_fraction"),
        ({"length": "curriculum", "curriculum_end": 0.0}, "curriculum_end"),
        ({"curriculum_end": 0.3}, "curriculum_end"),
        (
            {"source": "own", "length": "adaptive", "own": {"which": "worst"}, "per": "prompt"},
            "adaptive.target",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, key):
    with pytest.raises(ValueError, match=f"^{key} "):
        ResetConfig(**settings)
