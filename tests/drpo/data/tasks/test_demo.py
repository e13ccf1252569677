from __future__ import annotations

import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest

from drpo.data.tasks.demo import (
    ITEMS,
    DemoConfig,
    error_kind,
    make_demo,
    needed_items,
    true_reward,
    true_rewards,
)

PROMPT = "SUBREDDIT: r/camping\nPOST: we have mug bag but need rope soap tent lamp\nTL;DR:"

CASES = [
    # response, ended, kind, reward by hand
    (" rope soap tent lamp", True, "complete", 4.0),
    (" rope", True, "incomplete", -0.25),
    (" rope soap tent", True, "incomplete", -0.75),
    (" rope soap lamp", True, "incomplete", -0.75),
    ("", True, "incomplete", -2.0),
    (" rope soap mug lamp", True, "wrong_item", -0.75 - 2.0),
    (" rope soap tent kite", True, "wrong_item", -0.75 - 2.0),
    (" rope soap tent lamp mug", True, "wrong_item", -1.0 - 2.0),
    (" soap rope tent lamp", True, "wrong_order", -0.75 - 2.0),
    (" rope rope soap tent lamp", True, "wrong_order", -1.0 - 2.0),
    (" mug rope rope", True, "wrong_item", -0.25 - 4.0),
    (" rope soap tent lamp", False, "no_stop", -1.0 - 2.0),
    (" rope kite", False, "no_stop", -0.25 - 2.0 - 2.0),
    ("", False, "no_stop", -4.0),
]


@pytest.mark.parametrize(("response", "ended", "kind", "reward"), CASES)
def test_kinds_and_rewards_by_hand(response: str, ended: bool, kind: str, reward: float) -> None:
    assert error_kind(PROMPT, response, ended) == kind
    assert true_reward(PROMPT, response, ended) == pytest.approx(reward)


def test_true_rewards_reads_completions() -> None:
    completions = [SimpleNamespace(prompt=PROMPT, response=r, ended=e) for r, e, _, _ in CASES]
    assert true_rewards(completions) == pytest.approx([reward for _, _, _, reward in CASES])


def test_needed_items() -> None:
    assert needed_items(PROMPT) == ["rope", "soap", "tent", "lamp"]
    with pytest.raises(ValueError, match="names no needed item"):
        needed_items("SUBREDDIT: r/camping\nPOST: hello\nTL;DR:")


def test_items_are_plain_and_distinct() -> None:
    assert len(set(ITEMS)) == len(ITEMS)
    assert all(item.isascii() and item.isalpha() and item.islower() for item in ITEMS)
    assert not {"we", "have", "but", "need", "nothing"} & set(ITEMS)


@pytest.mark.parametrize("view", ["demonstrations", "pairs", "prompts", "ranked"])
def test_seeded_and_split(view: str) -> None:
    config = DemoConfig(num_train=300, num_eval=100)
    train, held_out = make_demo(config, view, "train"), make_demo(config, view, "eval")
    assert (len(train), len(held_out)) == (300, 100)
    assert train == make_demo(config, view, "train")
    assert train != make_demo(DemoConfig(num_train=300, seed=1), view, "train")
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert train[:50] == make_demo(DemoConfig(num_train=50), view, "train")
    assert [r.prompt for r in train] == [r.prompt for r in make_demo(config, "prompts", "train")]
    for record in train:
        assert record.prompt.endswith("\nTL;DR:")
        for text in (record.completion, record.chosen, record.rejected, *record.responses):
            assert text is None or (text.startswith(" ") and text == text.rstrip())


@pytest.mark.parametrize(
    ("view", "digest"),
    [
        ("demonstrations", "c9bccfa87126a2fe"),
        ("pairs", "b12b0b79f3dbefbe"),
        ("prompts", "1ecbfce066c720bf"),
    ],
)
def test_a_seed_gives_the_data_of_the_published_figures(view: str, digest: str) -> None:
    """Digests of the data as it was when the figures of docs/experiments.md were made."""
    records = make_demo(DemoConfig(num_train=3000), view, "train")
    texts = [(r.prompt, r.completion, r.chosen, r.rejected, r.origin) for r in records]
    assert hashlib.sha256(repr(texts).encode()).hexdigest()[:16] == digest


def test_no_post_of_one_seed_is_held_out_under_another() -> None:
    train = make_demo(DemoConfig(num_items=2, num_needed=2, num_train=4000), "prompts", "train")
    held_out = make_demo(DemoConfig(num_items=2, num_needed=2, num_eval=1000, seed=7), "prompts", "eval")
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}


def test_references_are_complete_and_pairs_differ() -> None:
    for record in make_demo(DemoConfig(num_train=300), "prompts", "train"):
        assert true_reward(record.prompt, record.completion, True) == 4.0
        assert record.chosen != record.rejected


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_completion_rate_is_the_share_of_complete_demonstrations(rate: float) -> None:
    config = DemoConfig(completion_rate=rate, error_rate=0.0, num_train=4000)
    records = make_demo(config, "demonstrations", "train")
    kinds = Counter(error_kind(r.prompt, r.completion, True) for r in records)
    assert set(kinds) == {"complete", "incomplete"}
    assert kinds["complete"] / 4000 == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)


def test_writers_slip() -> None:
    config = DemoConfig(completion_rate=1.0, error_rate=0.1, num_needed=5, num_train=4000)
    records = make_demo(config, "demonstrations", "train")
    faultless = sum(error_kind(r.prompt, r.completion, True) == "complete" for r in records) / 4000
    # 0.4 of the slips choose among the 5 needed items, so may hit the right one
    assert faultless == pytest.approx((1 - 0.1 * (1 - 0.4 / 5)) ** 5, abs=0.03)


def test_annotator_follows_bradley_terry() -> None:
    def margins(temperature: float) -> list[float]:
        config = DemoConfig(annotator_temperature=temperature, num_train=6000)
        records = make_demo(config, "pairs", "train")
        return [
            true_reward(r.prompt, r.chosen, True) - true_reward(r.prompt, r.rejected, True) for r in records
        ]

    assert min(margins(0.0)) == 0.0
    for margin, share in ((0.25, 0.5622), (1.75, 0.8520)):  # a right item more; a wrong item for a right one
        signs = [m > 0 for m in margins(1.0) if abs(m) == margin]
        assert len(signs) > 100
        four_sigma = 4 * (share * (1 - share) / len(signs)) ** 0.5
        assert sum(signs) / len(signs) == pytest.approx(share, abs=four_sigma)  # sigmoid(margin)
    assert min(margins(1e-9)) == 0.0  # a tiny temperature does not overflow


def test_pairs_have_the_true_rewards_also_when_the_label_is_wrong() -> None:
    gaps = []
    for r in make_demo(DemoConfig(num_train=3000), "pairs", "train"):
        assert set(r.extra) == {"chosen_score", "rejected_score"}
        assert r.extra["chosen_score"] == true_reward(r.prompt, r.chosen, True)
        assert r.extra["rejected_score"] == true_reward(r.prompt, r.rejected, True)
        gaps.append(r.extra["chosen_score"] - r.extra["rejected_score"])
    assert 0 < sum(gap < 0 for gap in gaps) < 0.2 * len(gaps)  # mislabelled by the annotator
    exact = make_demo(DemoConfig(num_train=3000, annotator_temperature=0.0), "pairs", "train")
    assert min(r.extra["chosen_score"] - r.extra["rejected_score"] for r in exact) == 0.0


def test_ranked_posts_have_different_responses_by_the_writers_of_pairs() -> None:
    records = make_demo(DemoConfig(num_train=1000, num_ranked=5), "ranked", "train")
    kinds: Counter[str] = Counter()
    for r in records:
        assert len(r.responses) == len(r.scores) == len(set(r.responses)) == 5
        kinds.update(error_kind(r.prompt, text, True) for text in r.responses)
    assert all(kinds[kind] > 100 for kind in ("complete", "incomplete", "wrong_item", "wrong_order"))


def test_the_annotator_ranks_as_it_labels_pairs() -> None:
    """Two scores are ordered with probability sigmoid(difference of true rewards / T), and are exact at T = 0."""
    wins: dict[float, list[bool]] = {}
    for r in make_demo(DemoConfig(annotator_temperature=1.0, num_train=8000), "ranked", "train"):
        rewards = [true_reward(r.prompt, text, True) for text in r.responses]
        margin = rewards[0] - rewards[1]
        wins.setdefault(abs(margin), []).append((r.scores[0] > r.scores[1]) == (margin > 0))
    for margin, share in ((0.25, 0.5622), (1.75, 0.8520)):
        assert len(wins[margin]) > 100
        four_sigma = 4 * (share * (1 - share) / len(wins[margin])) ** 0.5
        assert sum(wins[margin]) / len(wins[margin]) == pytest.approx(share, abs=four_sigma)
    noisy = make_demo(DemoConfig(annotator_temperature=2.0, num_train=5000), "ranked", "train")
    noise = [
        score - true_reward(r.prompt, text, True)
        for r in noisy
        for text, score in zip(r.responses, r.scores, strict=True)
    ]
    # Gumbel noise of scale 2: its mean is 2 times Euler's constant, its standard deviation 2 pi / sqrt(6)
    assert sum(noise) / len(noise) == pytest.approx(2 * 0.5772, abs=4 * 2.565 / len(noise) ** 0.5)
    for r in make_demo(DemoConfig(annotator_temperature=0.0, num_train=200), "ranked", "train"):
        assert list(r.scores) == [true_reward(r.prompt, text, True) for text in r.responses]


def test_pairs_show_every_kind_of_error() -> None:
    kinds: Counter[str] = Counter()
    same_length = 0
    for r in make_demo(DemoConfig(num_train=2000), "pairs", "train"):
        kinds.update(error_kind(r.prompt, text, True) for text in (r.chosen, r.rejected))
        same_length += len(r.chosen.split()) == len(r.rejected.split())
    assert all(kinds[kind] > 100 for kind in ("complete", "incomplete", "wrong_item", "wrong_order"))
    assert same_length > 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completion_rate", 0.0),
        ("completion_rate", 1.5),
        ("num_items", 1),
        ("num_items", 1000),
        ("num_needed", 1),
        ("num_needed", 13),
        ("error_rate", 1.0),
        ("annotator_temperature", -1.0),
        ("num_ranked", 1),
        ("num_ranked", 33),
        ("num_train", 0),
        ("num_eval", 0),
        ("seed", -1),
    ],
)
def test_config_errors_name_the_full_key(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} (\(\d+\) )?must be "):
        DemoConfig(**{field: value})
