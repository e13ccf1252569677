"""Conversations where models of several families meet: each reads them in its own template, and they name prompts
alike."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from online_runs import forget_precision
from reward_model_folders import save_reward_model, score_alone
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level, single_bytes

from drpo.config import ConfigError
from drpo.data.chat import ChatTemplate
from drpo.data.dialogue import dialogue, parse_prompt
from drpo.data.in_template import encode_in_template
from drpo.data.load import DataConfig, load_examples
from drpo.data.records import Chat, DataError, Record
from drpo.data.stop import with_stop_token
from drpo.engine import Engine, EngineConfig
from drpo.rewards import Completion
from drpo.rollout.generator import Generator, vocabulary_of
from drpo.rollout.sampler import SamplingConfig
from eval.completions.fixed_systems import reference_rows
from eval.completions.response_scores import response_kls, response_nlls, reward_scores
from eval.completions.rows import (
    CompletionRow,
    CompletionsWriter,
    messages_meta,
    prompt_id_of,
    read_completions,
)
from eval.completions.sample import Policy, make_requests
from eval.judging.matchup import pair_up, questions_of
from eval.judging.score_judges import ScoreJudge
from reward_models.score import RewardModelScorer

OTHER = (  # no header of its own before an answer, markup of special tokens before the text
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>say<s>{{ m.content }}<|im_end|>"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "because"},
    {"role": "user", "content": "really?"},
]
ROWS = [
    {
        "messages": [
            *TURNS[:3],
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ]
    }
    for i in range(40)
] + [{"prompt": f"POST {i}", "completion": f"c{i}"} for i in range(40)]


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    yield Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    forget_precision()


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return DataConfig(task="own", path=str(path), chat_template=True, eval_fraction=0.3)


def test_templates_share_what_is_held_out_and_the_names_of_prompts(config):
    splits = [load_examples(config, byte_level(chat_template=text), "prompts") for text in (CHATML, OTHER)]
    one, other = ([example.record.shared_prompt for example in split.eval] for split in splits)
    assert one == other and 5 < len(one) < 50
    assert {e.record.prompt for e in splits[0].eval}.isdisjoint(e.record.prompt for e in splits[1].eval)
    ids = [[request.prompt_id for request in make_requests(split.eval, None, [0])] for split in splits]
    assert ids[0] == ids[1]
    assert "POST 3" in {
        example.record.shared_prompt for split in splits for example in split.train + split.eval
    }


@pytest.mark.parametrize(
    "turns", [TURNS, TURNS[1:], TURNS[1:2], TURNS[:2], [{"role": "user", "content": "a\n\nb: c"}]]
)
def test_turns_are_those_of_their_dialogue(turns):
    assert parse_prompt(dialogue(turns)) == turns


CHAT_DATA = {
    "tldr": {
        "post": "POST: {}\n\nHuman: so she said\n\nAssistant: no.",
        "summaries": [" s{}", " t{}"],
        "overall": [1, 7],
    },
    "hh": {"chosen": "\n\nHuman: q{}\n\nAssistant: yes", "rejected": "\n\nHuman: q{}\n\nAssistant: no"},
    "own": {"prompt": "why {}?\n\nHuman: a quote\n\nAssistant: of it", "chosen": "yes", "rejected": "no"},
    "own with messages": {
        "prompt": [*TURNS[:3], {"role": "user", "content": "q{}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
}


@pytest.mark.parametrize("task", CHAT_DATA)
def test_a_reward_model_reads_a_finished_response_as_it_read_its_training_pairs(task, engine, tmp_path):
    """Training pairs, written as a policy's responses, read back, scored and judged: the ids of training."""
    path, tokenizer = tmp_path / "rows.jsonl", byte_level(chat_template=CHATML)
    path.write_text("\n".join(json.dumps(CHAT_DATA[task]).replace("{}", str(i)) for i in range(6)))
    data = DataConfig(task=task.split()[0], path=str(path), chat_template=True, eval_fraction=0)
    pairs = load_examples(data, with_stop_token(tokenizer, data), "pairs").train
    model = save_reward_model(tmp_path / "rm", with_stop_token(tokenizer, data))
    model.config.chat_template = True
    model.config.save_pretrained(tmp_path / "rm")
    scorer = RewardModelScorer.load(str(tmp_path / "rm"), engine, 4, "float32", None)
    expected = [
        [score_alone(model, pair.query_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        for pair in pairs
    ]

    rows = []
    with closing(CompletionsWriter(tmp_path / "completions.jsonl", {})) as writer:
        for pair in pairs:
            record = pair.record
            prompt, meta = record.shared_prompt, messages_meta(record)
            said = {
                "chosen": record.without_opening(record.chosen),
                "rejected": record.without_opening(record.rejected),
            }
            rows += [
                CompletionRow(name, prompt_id_of(prompt), prompt, text, True, None, 0, said["chosen"], meta)
                for name, text in said.items()
            ]
        writer.write(rows)
    rows = read_completions(tmp_path / "completions.jsonl")
    assert reward_scores(scorer, rows) == pytest.approx(
        [score for pair in expected for score in pair], abs=2e-5
    )
    assert reward_scores(scorer, reference_rows(rows)) == pytest.approx(
        [chosen for chosen, _ in expected], abs=2e-5
    )

    imported = [replace(row, meta={}) if row.system == "rejected" else row for row in rows]
    compared = pair_up(imported, "chosen", "rejected")
    verdicts = asyncio.run(_verdicts(ScoreJudge(scorer), questions_of(compared, "one", 0)))
    scores = [score for verdict in verdicts for score in verdict.scores]
    assert scores == pytest.approx([score for pair in expected for score in pair], abs=2e-5)


async def _verdicts(judge, questions):
    return [verdict async for verdict in judge.verdicts(questions)]


def test_messages_of_a_file_must_be_messages():
    row = CompletionRow("a", prompt_id_of("p"), "p", "r", True, None, 0, meta={"prompt_messages": "turns"})
    with pytest.raises(DataError, match="meta.prompt_messages of system a, .* is no list of messages"):
        row.messages  # noqa: B018


def test_what_is_no_dialogue_is_one_question():
    for text in ("POST: a\n\nTL;DR:", "", "\n\nHuman: a", "said\n\nHuman: b\n\nAssistant:"):
        assert parse_prompt(text) == [{"role": "user", "content": text}]
    assert dialogue(TURNS[:2]) == "\n\nSystem: Be brief.\n\nHuman: why?\n\nAssistant:"


# --- completions --------------------------------------------------------------------------------------------


def test_completions_name_prompt_and_answer_without_markup(config):
    tokenizer = byte_level(chat_template=OTHER)
    examples = load_examples(config, tokenizer, "prompts").train
    model = tiny_model("llama", vocab_size=len(tokenizer))
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    policy = Policy("sft", Generator(model, tokenizer, vocabulary, SamplingConfig(), 4, batch_size=8))
    (request,) = make_requests(
        [e for e in examples if e.record.shared_prompt.startswith("POST")][:1], None, [0]
    )
    record = request.example.record
    head = tokenizer("say", add_special_tokens=False).input_ids + [tokenizer.convert_tokens_to_ids("<s>")]
    text = tokenizer("well said", add_special_tokens=False).input_ids
    row = policy._row(request, [*head, *text, tokenizer.eos_token_id])
    assert (row.prompt, row.response, row.ended) == (record.shared_prompt, "well said", True)
    assert row.reference == "c" + row.prompt.removeprefix("POST ")
    assert row.prompt_id == prompt_id_of(row.prompt)
    assert row.meta["query_ids"] == request.example.query_ids
    assert tokenizer.decode(row.meta["query_ids"]) == f"[{row.prompt}]<|im_start|>"
    # Without the opening that the template knows, nothing is cut: "say" is a word like any other.
    assert policy._row(request, [*head[:-1], *text]).response == "saywell said"


def nll(model, query: list[int], response: list[int]) -> float:
    logprobs = torch.log_softmax(model(torch.tensor([query + response])).logits[0].double(), -1)
    return -sum(float(logprobs[len(query) - 1 + i, token]) for i, token in enumerate(response))


@torch.no_grad()
def test_a_policy_measures_texts_in_its_own_template_and_kl_on_the_tokens_that_were_read():
    tokenizer = byte_level(chat_template=OTHER)
    tokenizer.eos_token = "<|im_end|>"
    model, reference = (tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).eval() for seed in (0, 1))
    prompt = dialogue(TURNS)
    query = tokenizer("[Be brief.][why?]<|im_start|>say<s>because<|im_end|>[really?]<|im_start|>").input_ids
    said = tokenizer("say<s>yes").input_ids
    rows = [
        CompletionRow("sft", prompt_id_of(prompt), prompt, "yes", ended, None, seed)
        for seed, ended in enumerate((True, False))
    ]
    nlls, counts = response_nlls(model, tokenizer, rows, 2, ChatTemplate(tokenizer))
    responses = [[*said, tokenizer.eos_token_id], said]
    assert counts.tolist() == list(map(len, responses))
    assert nlls == pytest.approx([nll(model, query, ids) for ids in responses], abs=1e-3)

    kept = CompletionRow(
        "sft", "", prompt, "yes", True, None, 0, None, {"query_ids": [9, 8], "response_ids": [7, 6]}
    )
    (kl,) = response_kls(model, reference, tokenizer, [kept], 1)
    assert kl == pytest.approx(nll(reference, [9, 8], [7, 6]) - nll(model, [9, 8], [7, 6]), abs=1e-3)


def test_a_template_that_refuses_somebody_elses_prompt_says_so():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = byte_level(chat_template=strict)
    with pytest.raises(DataError, match="refuses the prompt .*no system"):
        encode_in_template(tokenizer, ChatTemplate(tokenizer), dialogue(TURNS), "yes", True)


# --- reward models ------------------------------------------------------------------------------------------


def reward_model(folder, template, **config):
    tokenizer = byte_level(chat_template=template)
    model = save_reward_model(folder, tokenizer)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    return model, tokenizer


def scorer_of(folder, engine, policy_folder) -> RewardModelScorer:
    return RewardModelScorer.load(str(folder), engine, 2, "float32", policy_folder and str(policy_folder))


def answered(ended=True, chat=True, **options) -> Completion:
    own = Chat(tuple(TURNS), dialogue(TURNS), **options) if chat else None
    return Completion(
        "<policy's markup>", "yes", ended, [40, 41], [90, 91, 7], Record("<policy's markup>", chat=own)
    )


def in_other(tokenizer, ended=True) -> tuple[list[int], list[int]]:
    query = tokenizer("[Be brief.][why?]<|im_start|>say<s>because<|im_end|>[really?]<|im_start|>").input_ids
    return query, tokenizer("say<s>yes" + "<|im_end|>" * ended).input_ids


@pytest.mark.parametrize("same_vocabulary", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_a_reward_model_with_another_template_sees_its_own(tmp_path, engine, same_vocabulary, ended):
    policy = byte_level(chat_template=CHATML) if same_vocabulary else single_bytes()
    policy.chat_template = CHATML
    policy.save_pretrained(tmp_path / "policy")
    model, tokenizer = reward_model(tmp_path / "rm", OTHER)
    scorer = scorer_of(tmp_path / "rm", engine, tmp_path / "policy")
    expected = score_alone(model, *in_other(tokenizer, ended))
    assert scorer([answered(ended)]).tolist() == pytest.approx([expected], abs=2e-5)


def test_a_reward_model_of_the_policys_template_sees_the_ids_with_the_stop_token_of_its_training(
    tmp_path, engine
):
    byte_level(chat_template=OTHER).save_pretrained(tmp_path / "policy")
    for name, config, stop in (
        ("elsewhere", {}, "<|im_end|>"),  # its template's
        ("ours", {"chat_template": True}, "<|endoftext|>"),  # its tokenizer's, as it was saved
    ):
        model, tokenizer = reward_model(tmp_path / name, OTHER, **config)
        scorer = scorer_of(tmp_path / name, engine, tmp_path / "policy")
        expected = score_alone(model, [40, 41], [90, 91, tokenizer.convert_tokens_to_ids(stop)])
        assert scorer([answered()]).tolist() == pytest.approx([expected], abs=2e-5)


def test_other_arguments_of_the_template_make_other_texts(tmp_path, engine):
    byte_level(chat_template=OTHER).save_pretrained(tmp_path / "policy")
    model, tokenizer = reward_model(tmp_path / "rm", OTHER, chat_template=True, chat_template_kwargs={"a": 1})
    scorer = scorer_of(tmp_path / "rm", engine, tmp_path / "policy")
    ids = scorer._ids(answered(arguments={"a": 1}))
    assert ids == ([40, 41], [90, 91, tokenizer.eos_token_id])
    assert scorer._ids(answered(arguments={"a": 2}))[0] == in_other(tokenizer)[0]


def test_texts_are_read_as_the_model_was_trained(tmp_path, engine):
    """Completions on file have no ids: dialogues go through the template, a text is one question."""
    row = CompletionRow("sft", "", dialogue(TURNS), "yes", True, None, 0)
    for name, config, template in (
        ("elsewhere", {}, OTHER),
        ("chat", {"chat_template": True}, OTHER),
        ("plain", {"chat_template": False}, OTHER),
        ("no template", {}, None),
    ):
        model, tokenizer = reward_model(tmp_path / name, template, **config)
        query, response = in_other(tokenizer)
        if name in ("plain", "no template"):
            query, response = (
                tokenizer(row.prompt).input_ids,
                [*tokenizer("yes").input_ids, tokenizer.eos_token_id],
            )
        elif name == "chat":
            response[-1] = tokenizer.eos_token_id
        expected = score_alone(model, query, response)
        assert reward_scores(scorer_of(tmp_path / name, engine, None), [row]) == pytest.approx(
            [expected], abs=2e-5
        )


@pytest.mark.parametrize(
    ("template", "config", "chat", "message"),
    [
        (None, {}, True, "reward.path: .*has no chat template"),
        (OTHER, {"chat_template": False}, True, "trained with data.chat_template=False"),
        (OTHER, {"chat_template": True}, False, "trained with data.chat_template=True"),
    ],
)
def test_a_reward_model_that_cannot_read_the_prompts_is_refused(
    tmp_path, engine, template, config, chat, message
):
    single_bytes().save_pretrained(tmp_path / "policy")
    reward_model(tmp_path / "rm", template, **config)
    scorer = scorer_of(tmp_path / "rm", engine, tmp_path / "policy")
    for refused in (lambda: scorer([answered(chat=chat)]), lambda: scorer.check_reads(chat)):
        with pytest.raises(ConfigError, match=message):
            refused()
