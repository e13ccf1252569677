from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from tiny_tokenizers import CHATML, byte_level, single_bytes

from drpo.data.encode import Example, encode_prompts, encode_records
from drpo.data.load import DataConfig, load_examples
from drpo.data.noise import NoiseConfig
from drpo.data.noise import add_noise as add_noise_to_examples
from drpo.data.records import BadRows, DataError, Record
from drpo.data.stop import with_stop_token
from drpo.data.tasks.demo import DemoConfig, true_reward

EXTRA = {
    "id": 7,
    "chosen_score": 3.0,
    "rejected_score": 1.0,
    "chosen_relevance": [1],
    "rejected_relevance": [0],
}


def add_noise(pairs: list[Record], config: NoiseConfig) -> tuple[list[Record], list[str]]:
    """The noise on examples of these records, each response with ids of its own."""
    texts = {text: [i] for i, text in enumerate({t for pair in pairs for t in (pair.chosen, pair.rejected)})}
    examples = [
        Example(pair, [0], chosen_ids=texts[pair.chosen], rejected_ids=texts[pair.rejected]) for pair in pairs
    ]
    noisy, notes = add_noise_to_examples(examples, config)
    for example in noisy:
        ids = (example.chosen_ids, example.rejected_ids)
        assert ids == (texts[example.record.chosen], texts[example.record.rejected])
    return [example.record for example in noisy], notes


def pairs_of(num_pairs: int, num_prompts: int | None = None) -> list[Record]:
    return [
        Record(f"p{i % (num_prompts or num_pairs)}", chosen=f" good{i}", rejected=f" bad{i}", origin=f"f:{i}")
        for i in range(num_pairs)
    ]


def flips(records: list[Record]) -> list[bool]:
    return [record.extra["flipped"] for record in records]


# --- flips ----------------------------------------------------------------------------------------------


def test_without_noise_nothing_changes_and_nothing_is_marked():
    pairs = pairs_of(5)
    assert add_noise(pairs, NoiseConfig(seed=3)) == (pairs, [])


def test_a_flip_swaps_the_responses_and_all_that_is_said_of_them():
    pair = Record("p", chosen=" a", rejected=" b", origin="f:1", extra=EXTRA)
    (noisy,), notes = add_noise([pair], NoiseConfig(flip_rate=1.0))
    assert (noisy.prompt, noisy.chosen, noisy.rejected, noisy.origin) == ("p", " b", " a", "f:1")
    assert noisy.extra == {
        "id": 7,
        "chosen_score": 1.0,
        "rejected_score": 3.0,
        "chosen_relevance": [0],
        "rejected_relevance": [1],
        "flipped": True,
        "off_topic": False,
    }
    assert notes == ["noise: 1 of 1 pairs flipped (100.0%)"]
    assert pair.extra == EXTRA and pair.chosen == " a"


@pytest.mark.parametrize("num_prompts", [6000, 20])  # one pair a prompt, and many pairs a prompt
def test_the_rate_is_that_of_independent_draws(num_prompts):
    pairs = pairs_of(6000, num_prompts)
    noisy, notes = add_noise(pairs, NoiseConfig(flip_rate=0.3))
    hit = flips(noisy)
    assert sum(hit) / 6000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 6000) ** 0.5)
    both = sum(a and b for a, b in zip(hit, hit[1:], strict=False)) / 5999
    assert both == pytest.approx(0.09, abs=0.02)  # neighbours are independent
    assert notes == [f"noise: {sum(hit)} of 6000 pairs flipped ({sum(hit) / 60:.1f}%)"]
    for pair, record in zip(pairs, noisy, strict=True):
        texts = (pair.rejected, pair.chosen) if record.extra["flipped"] else (pair.chosen, pair.rejected)
        assert (record.chosen, record.rejected) == texts


def test_what_hits_a_pair_depends_on_the_seed_and_its_prompt_alone():
    pairs = pairs_of(400)
    config = NoiseConfig(flip_rate=0.5)
    by_prompt = {record.prompt: record for record in add_noise(pairs, config)[0]}
    fewer, _ = add_noise(pairs[::-3], config)
    assert fewer == [by_prompt[record.prompt] for record in fewer]
    assert flips(add_noise(pairs, NoiseConfig(flip_rate=0.5, seed=1))[0]) != flips(by_prompt.values())
    other_texts = [Record(pair.prompt, chosen=" x", rejected=" y") for pair in pairs]
    assert flips(add_noise(other_texts, config)[0]) == flips(by_prompt.values())


def test_a_higher_rate_hits_the_same_pairs_and_more():
    pairs = pairs_of(500)
    low, high = (flips(add_noise(pairs, NoiseConfig(flip_rate=rate))[0]) for rate in (0.2, 0.4))
    assert sum(low) < sum(high)
    assert all(hit_high or not hit_low for hit_low, hit_high in zip(low, high, strict=True))


# --- off topic ------------------------------------------------------------------------------------------


def test_an_off_topic_pair_is_that_of_another_prompt_and_keeps_its_own_extra():
    pairs = [
        Record(f"p{i % 50}", chosen=f" g{i}", rejected=f" b{i}", extra={"id": i, "chosen_score": float(i)})
        for i in range(2000)
    ]
    by_text = {pair.chosen: pair for pair in pairs}
    noisy, notes = add_noise(pairs, NoiseConfig(off_topic_rate=0.25, flip_rate=0.5))
    off_topic = [record for record in noisy if record.extra["off_topic"]]
    assert len(off_topic) / 2000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    flipped_too = sum(flips(off_topic)) / len(off_topic)
    assert flipped_too == pytest.approx(0.5, abs=4 * (0.25 / len(off_topic)) ** 0.5)
    for pair, record in zip(pairs, noisy, strict=True):
        texts = (
            (record.rejected, record.chosen) if record.extra["flipped"] else (record.chosen, record.rejected)
        )
        source = by_text[texts[0]]
        side = "rejected" if record.extra["flipped"] else "chosen"
        assert texts == (source.chosen, source.rejected)
        assert (source.prompt != pair.prompt) == record.extra["off_topic"]
        assert (record.prompt, record.extra["id"]) == (pair.prompt, pair.extra["id"])
        assert record.extra[f"{side}_score"] == source.extra["chosen_score"]
    assert len({record.chosen for record in off_topic}) > 0.8 * len(off_topic)  # from all over the data
    assert [note.split(" (")[0] for note in notes] == [
        f"noise: {sum(flips(noisy))} of 2000 pairs flipped",
        f"noise: {len(off_topic)} of 2000 pairs off topic",
    ]


def test_the_flips_do_not_depend_on_the_other_noise():
    pairs = pairs_of(300)
    alone, _ = add_noise(pairs, NoiseConfig(flip_rate=0.4))
    both, _ = add_noise(pairs, NoiseConfig(flip_rate=0.4, off_topic_rate=0.6))
    assert flips(alone) == flips(both)


def test_noise_that_cannot_be_made_is_refused():
    with pytest.raises(DataError, match="f:9 is none"):
        add_noise_to_examples(
            [Example(Record("p", completion=" c", origin="f:9"), [1])], NoiseConfig(flip_rate=0.1)
        )
    with pytest.raises(DataError, match=r"noise\.off_topic_rate needs pairs on at least 2"):
        add_noise(pairs_of(4, num_prompts=1), NoiseConfig(off_topic_rate=0.1))


@pytest.mark.parametrize(
    ("field", "value"), [("flip_rate", -0.1), ("flip_rate", 1.1), ("off_topic_rate", 2.0), ("seed", -1)]
)
def test_config_errors_name_the_full_key(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be "):
        NoiseConfig(**{field: value})


# --- as part of the data --------------------------------------------------------------------------------


def test_only_train_pairs_get_noise_and_their_ids_follow(tmp_path):
    rows = [{"prompt": f"prompt {i}", "chosen": f" a{i}", "rejected": f" b{i}"} for i in range(300)]
    rows[9]["chosen"] = " too long a response to be kept"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = single_bytes()
    options = {"task": "own", "path": str(path), "eval_fraction": 0.2, "max_response_length": 9}
    clean = load_examples(DataConfig(**options), tokenizer, "pairs")
    noise = NoiseConfig(flip_rate=0.4, off_topic_rate=0.3)
    noisy = load_examples(DataConfig(**options, noise=noise), tokenizer, "pairs")
    assert noisy.eval == clean.eval
    assert [e.record.prompt for e in noisy.train] == [e.record.prompt for e in clean.train]
    assert [e.query_ids for e in noisy.train] == [e.query_ids for e in clean.train]
    for example in noisy.train:
        texts = [tokenizer.decode(ids[:-1]) for ids in (example.chosen_ids, example.rejected_ids)]
        assert texts == [example.record.chosen, example.record.rejected]
    num_flipped = sum(example.record.extra["flipped"] for example in noisy.train)
    assert 0 < num_flipped < len(noisy.train)
    share = f"({num_flipped / len(noisy.train):.1%})"
    assert f"noise: {num_flipped} of {len(noisy.train)} pairs flipped {share}" in noisy.report
    assert "noise" not in clean.report and "1 x response too long" in noisy.report


def spoilt_and_encoded_again(tokenizer, examples: list[Example], noise: NoiseConfig) -> list[Example]:
    """The definition of the noise, on the texts alone: draw, exchange texts, encode everything anew."""
    records, num_seen = [], {}
    for example in examples:
        old = example.record
        place = num_seen[old.prompt] = num_seen.get(old.prompt, -1) + 1
        rng = random.Random(f"{noise.seed}/{place}/{old.prompt}")
        flipped, off_topic = rng.random() < noise.flip_rate, rng.random() < noise.off_topic_rate
        source = old
        while off_topic and source.prompt == old.prompt:
            source = rng.choice(examples).record
        other = {"chosen": "rejected", "rejected": "chosen"} if flipped else {}
        extra = {k: v for k, v in old.extra.items() if k.partition("_")[0] not in ("chosen", "rejected")}
        for key, value in source.extra.items():
            side, _, rest = key.partition("_")
            if side in ("chosen", "rejected"):
                extra[f"{other.get(side, side)}_{rest}"] = value
        new = {other.get(side, side): getattr(source, side) for side in ("chosen", "rejected")}
        extra |= {"flipped": flipped, "off_topic": off_topic}
        records.append(replace(old, **new, extra=extra))
    prompts = [record.marked_prompt for record in records]
    queries = dict(zip(prompts, encode_prompts(tokenizer, prompts), strict=True))
    return encode_records(tokenizer, records, queries, "pairs", BadRows())


@pytest.mark.parametrize("data", ["demo", "own", "own in a chat template"])
def test_noise_on_examples_is_noise_on_texts_that_are_encoded_again(data, tmp_path):
    if data == "demo":
        tokenizer, options = byte_level(), {"demo": DemoConfig(num_train=120, num_eval=4)}
    else:
        rows = [
            {"prompt": f"prompt {i % 40}", "chosen": f" a{i}", "rejected": f" b{i} <eos>", **EXTRA, "id": i}
            for i in range(120)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        chat = data != "own"
        tokenizer = byte_level(chat_template=CHATML) if chat else single_bytes(bos=True)
        options = {"task": "own", "path": str(path), "max_prompt_length": 60, "chat_template": chat}
    noise = NoiseConfig(flip_rate=0.4, off_topic_rate=0.3, seed=5)
    clean = load_examples(DataConfig(**options), tokenizer, "pairs")
    noisy = load_examples(DataConfig(**options, noise=noise), tokenizer, "pairs")
    tokenizer = with_stop_token(tokenizer, DataConfig(**options))
    assert noisy.train == spoilt_and_encoded_again(tokenizer, clean.train, noise)
    kinds = {(e.record.extra["flipped"], e.record.extra["off_topic"]) for e in noisy.train}
    assert len(kinds) == 4 and noisy.eval == clean.eval


@pytest.mark.parametrize("view", ["demonstrations", "prompts", "ranked", "unpaired"])
def test_views_without_pairs_refuse_noise(view):
    config = DataConfig(demo=DemoConfig(num_train=20, num_eval=5), noise=NoiseConfig(flip_rate=0.1))
    with pytest.raises(DataError, match=f"noise applies to preference pairs, .*takes {view}"):
        load_examples(config, byte_level(), view)


def test_a_flipped_demo_pair_still_has_the_true_rewards_of_its_responses():
    config = DataConfig(demo=DemoConfig(num_train=50, num_eval=5), noise=NoiseConfig(flip_rate=0.5))
    for example in load_examples(config, byte_level(), "pairs").train:
        record = example.record
        for side in ("chosen", "rejected"):
            assert record.extra[f"{side}_score"] == true_reward(record.prompt, getattr(record, side), True)
