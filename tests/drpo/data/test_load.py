from __future__ import annotations

import json
import random

import pytest
from omegaconf import OmegaConf
from real_data import DATA
from tiny_tokenizers import CHATML, byte_level, single_bytes

from drpo.config_help import options
from drpo.data.encode import encode_query
from drpo.data.load import DataConfig, load_examples, load_texts
from drpo.data.records import DataError
from drpo.data.tasks.demo import DemoConfig

TLDR, HH = DATA / "tldr/axis.jsonl", DATA / "hh/harmless-base.jsonl.gz"
VIEWS = ("demonstrations", "pairs", "prompts")
ALL_VIEWS = (*VIEWS, "ranked", "unpaired")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(num_rows, start=0):
    return [
        {"prompt": f"prompt {i}", "completion": f" c{i}", "chosen": f" a{i}", "rejected": f" b{i}"}
        for i in range(start, start + num_rows)
    ]


def own(path, **options):
    return DataConfig(task="own", path=path, **options)


def prompts_of(examples):
    return {example.record.prompt for example in examples}


# --- config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"path": "x"}, "path"),
        ({"chat_template": True}, "chat_template"),
        ({"eval_fraction": 0.1}, "eval_fraction"),
        ({"split_seed": 1}, "split_seed"),
        ({"train_split": "test"}, "train_split"),
        ({"task": "tldr"}, "path"),
        ({"task": "reddit", "path": "x"}, "task"),
        ({"task": "hh", "path": ""}, "path"),
        ({"task": "own", "path": "x", "demo": DemoConfig(seed=3)}, "demo"),
        ({"task": "own", "path": "x", "limit": 0}, "limit"),
        ({"task": "own", "path": "x", "max_prompt_length": 0}, "max_prompt_length"),
        ({"task": "own", "path": "x", "max_response_length": -1}, "max_response_length"),
        ({"task": "own", "path": "x", "max_bad_fraction": 1.5}, "max_bad_fraction"),
        ({"task": "own", "path": "x", "eval_fraction": 1.0}, "eval_fraction"),
        ({"task": "own", "path": "x", "eval_split": "train"}, "eval_split"),
        ({"task": "own", "path": "x", "eval_split": "test", "eval_fraction": 0.1}, "eval_fraction"),
        ({"task": "own", "path": "x", "eval_split": "test", "split_seed": 1}, "split_seed"),
        ({"task": "own", "path": "x", "columns": {"text": "t"}}, "columns.text"),
        ({"task": "hh", "path": "x", "columns": {"prompt": "t"}}, "columns"),
        ({"task": "own", "path": "x", "truncation": "left"}, "truncation"),
        ({"task": "own", "path": "x", "truncation": "paragraph", "max_prompt_length": 9}, "truncation"),
        (
            {"task": "hh", "path": "x", "truncation": "left", "max_prompt_length": 9, "chat_template": True},
            "truncation",
        ),
    ],
)
def test_impossible_settings_name_the_key(options, key):
    with pytest.raises(ValueError, match=f"^{key} "):
        DataConfig(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task": "demo"}, "refuse"),
        ({"task": "own", "path": "x"}, "refuse"),
        ({"task": "tldr", "path": "x"}, "paragraph"),
        ({"task": "hh", "path": "x"}, "left"),
        ({"task": "hh", "path": "x", "chat_template": True}, "refuse"),
        ({"task": "tldr", "path": "x", "chat_template": True}, "paragraph"),
        ({"task": "hh", "path": "x", "truncation": "refuse", "max_prompt_length": 9}, "refuse"),
    ],
)
def test_the_default_truncation_is_the_tasks_own(options, expected):
    assert DataConfig(**options).prompt_truncation == expected


def test_the_config_is_a_structured_config():
    schema = OmegaConf.structured(DataConfig)
    overrides = ["task=own", "path=x", "columns.prompt=question", "truncation=refuse", "max_prompt_length=5"]
    config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(overrides)))
    assert config == own("x", columns={"prompt": "question"}, truncation="refuse", max_prompt_length=5)
    with pytest.raises(Exception, match="tldr"):
        OmegaConf.merge(schema, OmegaConf.from_dotlist(["task=reddit"]))


def test_every_key_has_a_help_text():
    assert [option.key for option in options(DataConfig) if not option.help] == []


# --- splits ---------------------------------------------------------------------------------------------


def test_the_same_prompts_are_held_out_in_every_view_and_whatever_else_is_there(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows_of(400))
    tokenizer = single_bytes()
    splits = {name: load_examples(own(path), tokenizer, name) for name in VIEWS}
    held_out = prompts_of(splits["pairs"].eval)
    for split in splits.values():
        assert prompts_of(split.eval) == held_out
        assert prompts_of(split.train) == {row["prompt"] for row in rows_of(400)} - held_out
    assert 5 <= len(held_out) <= 40

    longer = write(tmp_path / "more.jsonl", rows_of(300, start=400) + rows_of(400)[::-1])
    more = load_examples(own(longer, max_prompt_length=11, max_response_length=6), tokenizer, "pairs")
    assert prompts_of(more.eval) & {row["prompt"] for row in rows_of(400)} == held_out

    other_seed = load_examples(own(path, split_seed=1), tokenizer, "pairs")
    assert prompts_of(other_seed.eval) != held_out


def test_repeated_prompts_stay_on_one_side(tmp_path):
    rng = random.Random(0)
    rows = [row | {"completion": f" {i}"} for i, row in enumerate(rng.choices(rows_of(60), k=300))]
    splits = load_examples(
        own(write(tmp_path / "r.jsonl", rows), eval_fraction=0.3), single_bytes(), "demonstrations"
    )
    assert len(splits.train) + len(splits.eval) == 300
    assert not prompts_of(splits.train) & prompts_of(splits.eval)
    distinct = load_examples(own(str(tmp_path / "r.jsonl"), eval_fraction=0.3), single_bytes(), "prompts")
    assert len(distinct.train) == len(prompts_of(splits.train))
    assert len(distinct.eval) == len(prompts_of(splits.eval))


def test_an_eval_split_of_its_own_takes_its_prompts_from_train(tmp_path):
    write(tmp_path / "train.jsonl", rows_of(20))
    write(tmp_path / "test.jsonl", rows_of(5, start=18))
    splits = load_examples(own(str(tmp_path), eval_split="test"), single_bytes(), "pairs")
    assert prompts_of(splits.eval) == {f"prompt {i}" for i in range(18, 23)}
    assert prompts_of(splits.train) == {f"prompt {i}" for i in range(18)}
    assert "2 pairs left out of train: prompt held out" in splits.report


def test_prompts_that_truncation_makes_equal_are_one_prompt(tmp_path):
    rows = [
        {
            "chosen": f"\n\nHuman: {i} and so on\n\nAssistant: a",
            "rejected": f"\n\nHuman: {i} and so on\n\nAssistant: b",
        }
        for i in range(40)
    ]
    config = DataConfig(
        task="hh", path=write(tmp_path / "r.jsonl", rows), max_prompt_length=14, eval_fraction=0.5
    )
    assert "no examples are left to train on" in load_examples_or_error(config, "pairs")
    whole = load_examples(
        DataConfig(task="hh", path=config.path, eval_fraction=0.0), single_bytes(), "prompts"
    )
    assert (len(whole.train), len(whole.eval)) == (40, 0)
    short = load_examples(
        DataConfig(task="hh", path=config.path, eval_fraction=0.0, max_prompt_length=14),
        single_bytes(),
        "prompts",
    )
    assert [example.record.prompt for example in short.train] == ["on\n\nAssistant:"[-15:]] or len(
        short.train
    ) == 1
    assert "39 rows repeat a prompt" in short.report


def load_examples_or_error(config, view):
    with pytest.raises(DataError) as error:
        load_examples(config, single_bytes(), view)
    return str(error.value)


def test_a_fraction_that_holds_out_nothing_is_an_error(tmp_path):
    path = write(tmp_path / "r.jsonl", rows_of(3))
    assert "eval_fraction=1e-06 of 3 distinct prompts" in load_examples_or_error(
        own(path, eval_fraction=1e-6), "pairs"
    )
    splits = load_examples(own(path, eval_fraction=0.0), single_bytes(), "pairs")
    assert (len(splits.train), len(splits.eval)) == (3, 0)


# --- bad rows -------------------------------------------------------------------------------------------


def test_too_many_bad_rows_stop_the_run_with_file_line_and_kind(tmp_path):
    rows = rows_of(98) + [{"prompt": "p", "completion": ""}, {"completion": " x"}]
    path = write(tmp_path / "rows.jsonl", rows)
    message = load_examples_or_error(own(path), "demonstrations")
    assert "2 of 100 rows are bad" in message
    assert "rows.jsonl:99" in message and "rows.jsonl:100" in message
    assert "1 x empty text" in message and "1 x missing field" in message
    splits = load_examples(own(path, max_bad_fraction=0.02), single_bytes(), "demonstrations")
    assert len(splits.train) + len(splits.eval) == 98
    assert "100 rows read, 2 bad" in splits.report


def test_too_long_prompts_and_responses_are_bad_examples(tmp_path):
    rows = rows_of(100)
    rows[4]["prompt"] = "much too long a prompt"
    rows[7]["chosen"] = " much too long"
    path = write(tmp_path / "rows.jsonl", rows)
    limits = {"max_prompt_length": 12, "max_response_length": 6, "eval_fraction": 0.2}
    message = load_examples_or_error(own(path, **limits), "pairs")
    assert "2 of 100 examples are bad" in message
    assert "rows.jsonl:5: 22 tokens, max_prompt_length=12" in message
    assert "rows.jsonl:8: 15 tokens, max_response_length=6" in message
    splits = load_examples(own(path, **limits, max_bad_fraction=0.02), single_bytes(), "pairs")
    assert len(splits.train) + len(splits.eval) == 98
    prompts = load_examples(own(path, **limits), single_bytes(), "prompts")
    assert len(prompts.train) + len(prompts.eval) == 99
    assert max(len(example.chosen_ids) for example in prompts.train + prompts.eval) == 6


def test_rows_that_lack_what_a_view_needs(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "completion": " c"} for i in range(50)])
    assert "no pairs: they need chosen + rejected" in load_examples_or_error(own(path), "pairs")
    mixed = write(tmp_path / "mixed.jsonl", rows_of(50) + [{"prompt": "x"}])
    assert "1 of 51 examples are bad" in load_examples_or_error(own(mixed), "pairs")


def test_limit(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows_of(200))
    splits = load_examples(own(path, limit=80), single_bytes(), "pairs")
    assert prompts_of(splits.train) | prompts_of(splits.eval) == {f"prompt {i}" for i in range(80)}


# --- tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_the_demo(view):
    config = DataConfig(demo=DemoConfig(num_train=40, num_eval=8), limit=30)
    tokenizer = byte_level()
    splits = load_examples(config, tokenizer, view)
    assert len(splits.train) == (60 if view == "unpaired" else 30)
    assert 0 < len(splits.eval) <= 8 or view in ("pairs", "unpaired")
    assert not prompts_of(splits.train) & prompts_of(splits.eval)
    for example in splits.train:
        assert tokenizer.decode(example.query_ids) == example.record.prompt
        ids = {"pairs": example.chosen_ids, "ranked": [i for ids in example.ranked_ids for i in ids]}.get(
            view, example.completion_ids
        )
        assert ids[-1] == tokenizer.eos_token_id


def test_labelled_completions_of_own_data(tmp_path):
    rows = [{"prompt": f"prompt {i}", "answer": f" c{i}", "liked": i % 3 == 0} for i in range(50)]
    config = own(write(tmp_path / "r.jsonl", rows), columns={"completion": "answer", "label": "liked"})
    splits = load_examples(config, single_bytes(), "unpaired")
    assert len(splits.train) + len(splits.eval) == 50
    for example in splits.train + splits.eval:
        assert example.record.extra == {"label": int(example.record.prompt.split()[1]) % 3 == 0}
        assert single_bytes().decode(example.completion_ids[:-1]) == example.record.completion
    assert f"train: {len(splits.train)} unpaired responses" in splits.report
    rows[7]["liked"] = "rather"
    write(tmp_path / "r.jsonl", rows)
    assert "1 x wrong type" in load_examples_or_error(config, "unpaired")
    assert len(load_examples(config, single_bytes(), "demonstrations").train) == len(splits.train)


def test_hh_with_chat_template_and_left_truncation(tmp_path):
    context = "\n\nHuman: " + "so " * 30 + "\n\nAssistant: ok\n\nHuman: {}?\n\nAssistant:"
    rows = [{"chosen": context.format(i) + " yes", "rejected": context.format(i) + " no"} for i in range(30)]
    path = write(tmp_path / "rows.jsonl", rows)
    options = {"task": "hh", "path": path, "eval_fraction": 0.3}
    short = load_examples(DataConfig(**options, max_prompt_length=40), single_bytes(bos=True), "pairs")
    for example in short.train:
        assert len(example.query_ids) == 40
        assert example.query_ids == encode_query(single_bytes(bos=True), example.record.prompt)
        assert example.record.prompt.endswith("?\n\nAssistant:")
    tokenizer = byte_level(chat_template=CHATML)
    chat = load_examples(DataConfig(**options, chat_template=True), tokenizer, "pairs")
    for example in chat.train:
        assert tokenizer.decode(example.query_ids + example.chosen_ids).endswith(
            "?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
        )


def test_texts_for_a_tokenizer_are_distinct_and_without_held_out_prompts(tmp_path):
    rows = rows_of(100) + rows_of(10)
    path = write(tmp_path / "rows.jsonl", rows)
    texts = load_texts(own(path, eval_fraction=0.2))
    splits = load_examples(own(path, eval_fraction=0.2), single_bytes(), "demonstrations")
    train = prompts_of(splits.train)
    assert set(texts) == {text for row in rows if row["prompt"] in train for text in row.values()}
    assert len(texts) == len(set(texts))
    assert len(load_texts(DataConfig(demo=DemoConfig(num_train=20, num_eval=8)))) >= 40
    with pytest.raises(DataError, match="chat_template=true needs a tokenizer"):
        load_texts(own(path, chat_template=True))


# --- real data ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TLDR.is_file(), reason=f"no real TL;DR data at {TLDR} (set DRPO_DATA)")
def test_real_posts_load_without_unexplained_losses():
    texts = load_texts(DataConfig(task="tldr", path=str(TLDR), eval_fraction=0.1))
    tokenizer = byte_level(texts[:1000], vocab_size=3000, bos=True)
    rows = [json.loads(line) for line in TLDR.read_text(encoding="utf-8").split("\n") if line]
    config = DataConfig(task="tldr", path=str(TLDR), eval_fraction=0.1, max_prompt_length=256)
    counts = {
        "demonstrations": 572,
        "prompts": 572,
        "pairs": sum(
            high > low and a.strip() != b.strip()
            for row in rows
            for a, high in zip(row["summaries"], row["overall"], strict=True)
            for b, low in zip(row["summaries"], row["overall"], strict=True)
        ),
    }
    held_out = None
    for view in VIEWS:
        splits = load_examples(config, tokenizer, view)
        assert len(splits.train) + len(splits.eval) == counts[view]
        assert not prompts_of(splits.train) & prompts_of(splits.eval)
        queries = {example.record.prompt: example.query_ids for example in splits.train + splits.eval}
        for prompt, query_ids in queries.items():
            assert len(query_ids) <= 256
            assert tokenizer.decode(query_ids) == "<s>" + prompt
            assert prompt.endswith("\n\nTL;DR:")
        origins = {example.record.origin for example in splits.eval}
        held_out = held_out or origins
        assert origins <= held_out
    best = {f"axis.jsonl:{i}": max(row["overall"]) for i, row in enumerate(rows, 1)}
    for example in load_examples(config, tokenizer, "prompts").eval:
        record = example.record
        assert record.scores[record.responses.index(record.completion)] == best[record.origin]
        assert tokenizer.decode(example.completion_ids[:-1]) == record.completion
        assert len(example.ranked_ids) == len(record.responses)


@pytest.mark.skipif(not HH.is_file(), reason=f"no real HH data at {HH} (set DRPO_DATA)")
def test_real_dialogues_load_without_unexplained_losses():
    config = DataConfig(task="hh", path=str(HH), max_prompt_length=400)
    tokenizer = byte_level(load_texts(config)[:1000], vocab_size=2000)
    pairs = load_examples(config, tokenizer, "pairs")
    assert len(pairs.train) + len(pairs.eval) + 6 == 1800
    assert "1800 rows read, 6 bad" in pairs.report
    prompts = load_examples(config, tokenizer, "prompts")
    repeats = [line for line in prompts.report.splitlines() if "repeat a prompt" in line]
    num_repeats = sum(int(line.split()[0]) for line in repeats)
    assert len(prompts.train) + len(prompts.eval) + num_repeats + 6 == 1800
    for example in pairs.train:
        assert len(example.query_ids) <= 400
        assert example.record.prompt.endswith("\n\nAssistant:")
        assert tokenizer.decode(example.query_ids) == example.record.prompt
