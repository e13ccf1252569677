"""The stop token: one for training, sampling, scoring and the saved policy."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import CHATML, byte_level, sentencepiece, with_markup
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from drpo.config import ConfigError
from drpo.data.chat import ChatTemplate
from drpo.data.encode import decode_response, encode_response, readable_texts
from drpo.data.load import DataConfig, load_examples
from drpo.data.records import DataError
from drpo.data.stop import with_stop_token
from drpo.models.export import save_policy
from drpo.models.policy_stops import check_stop_token, stop_ids, write_stop_token
from drpo.rollout.generator import vocabulary_of

GEMMA = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"prompt": f"why {i}?", "completion": f"because {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}
    for i in range(4)
]
VIEWS = {
    "demonstrations": ["completion_ids"],
    "pairs": ["chosen_ids", "rejected_ids"],
    "prompts": ["completion_ids"],
}


def config(path, **options) -> DataConfig:
    return DataConfig(task="own", path=str(path), eval_fraction=0, **options)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def template(turn_end: str, last_end: str = "") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + f"{{% if loop.last and m.role == 'assistant' %}}{last_end or turn_end}{{% else %}}{turn_end}{{% endif %}}"
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.mark.parametrize(
    ("text", "token"),
    [
        (template("<|im_end|>\n"), "<|im_end|>"),
        (template("<|im_end|>\n", "<|im_end|>\n{{ eos_token }}"), "<|im_end|>"),  # Phi 3
        (template("<|im_end|><s>"), "<|im_end|>"),  # Command R7B: the first of two
        (template(" <|im_end|>"), "<|im_end|>"),  # Llama 2: a space before it
        (template("\n"), "<|im_start|>"),  # GLM: only the next turn ends it
        (template("{{ eos_token }}"), "<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("view", VIEWS)
def test_the_stop_token_is_the_end_of_turn_in_every_view(rows, text, token, view):
    tokenizer = byte_level(chat_template=text)
    examples = load_examples(config(rows, chat_template=True), tokenizer, view).train
    stop = tokenizer.convert_tokens_to_ids(token)
    responses = [getattr(example, name) for example in examples for name in VIEWS[view]]
    assert len(responses) == len(ROWS) * len(VIEWS[view])
    assert all(ids[-1] == stop and stop not in ids[:-1] for ids in responses)
    space = " " if text == template(" <|im_end|>") else ""
    assert {tokenizer.decode(ids[:-1])[-1 - len(space) :] for ids in responses} == {
        f"{i}{space}" for i in range(4)
    }
    assert tokenizer.eos_token == "<|endoftext|>"  # the caller's tokenizer is left as it was


def test_without_a_chat_template_it_is_the_eos_token_or_the_one_named(rows):
    tokenizer = byte_level()
    for named, token in ((None, "<|endoftext|>"), ("<|im_end|>", "<|im_end|>")):
        examples = load_examples(config(rows, stop_token=named), tokenizer, "demonstrations").train
        assert {tokenizer.decode(example.completion_ids[-1:]) for example in examples} == {token}


def test_the_named_token_goes_before_that_of_the_template(rows):
    tokenizer = byte_level(chat_template=CHATML)
    named = config(rows, chat_template=True, stop_token="<|endoftext|>")
    (example, *_) = load_examples(named, tokenizer, "demonstrations").train
    assert tokenizer.decode(example.query_ids + example.completion_ids).endswith("because 0<|endoftext|>")


def test_a_token_that_does_not_exist_or_stands_inside_a_response_is_told(rows):
    with pytest.raises(DataError, match=r"stop_token: '<never>' is not a single token"):
        load_examples(config(rows, stop_token="<never>"), byte_level(), "pairs")
    with pytest.raises(DataError, match=r"stop_token: '\[PAD\]' is the padding token"):
        load_examples(config(rows, stop_token="[PAD]"), byte_level(), "pairs")
    with pytest.raises(DataError, match="4 x stop token inside"):
        load_examples(config(rows, stop_token="u"), byte_level(vocab_size=261), "demonstrations")


def test_an_end_of_turn_that_pads_is_refused_with_what_to_do(rows):
    tokenizer = byte_level(chat_template=CHATML)
    tokenizer.pad_token = "<|im_end|>"
    with pytest.raises(
        DataError,
        match=r"^the tokenizer's chat template ends a turn with '<\|im_end\|>', .*pad_token.*stop_token",
    ):
        load_examples(config(rows, chat_template=True), tokenizer, "demonstrations")
    other = config(rows, chat_template=True, stop_token="<|endoftext|>")
    assert load_examples(other, tokenizer, "demonstrations").train


def test_an_end_of_turn_that_is_no_token_is_refused_by_the_key_that_helps(rows):
    spelled = CHATML.replace("<|im_end|>", "<|end_of_turn|>")
    with pytest.raises(DataError, match=r"'<\|end_of_turn\|>.*stop_token"):
        load_examples(config(rows, chat_template=True), byte_level(chat_template=spelled), "pairs")
    named = config(rows, chat_template=True, stop_token="<|im_end|>")
    assert load_examples(named, byte_level(chat_template=spelled), "pairs").train


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs needs"),
        (
            {"chat_template": True, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages",
        ),
    ],
)
def test_arguments_without_a_meaning_are_refused(options, key):
    with pytest.raises(ValueError, match=key):
        config("x", **options)


def test_arguments_reach_the_template():
    text = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ extra }}"
    chat = ChatTemplate(with_markup("{{ extra }}" + text.removesuffix("{{ extra }}")), {"extra": "Hm. "})
    assert chat.render([{"role": "user", "content": "a"}], ["b"]) == ("Hm. a<|im_end|>", ["b"])


# --- the policy ---------------------------------------------------------------------------------------------


def policy_that_ends_with(*ids: int):
    policy = tiny_model("llama", vocab_size=500)
    policy.generation_config = GenerationConfig(eos_token_id=list(ids) if len(ids) > 1 else ids[0])
    return policy


def test_all_that_ends_the_policys_responses_ends_a_sample():
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    policy = policy_that_ends_with(ids["<|im_end|>"], ids["<|endoftext|>"])
    vocabulary = vocabulary_of(tokenizer, 500, stop_ids(policy))
    assert vocabulary.stop_ids == (ids["<|endoftext|>"], ids["<|im_end|>"])
    assert stop_ids(policy_that_ends_with(7)) == (7,)
    assert stop_ids(tiny_model("llama")) == ()  # the defaults of an architecture say nothing of a tokenizer


def test_a_policy_that_never_says_the_stop_token_is_refused_with_the_remedy():
    tokenizer = byte_level(chat_template=CHATML)
    own = with_stop_token(tokenizer, DataConfig(task="own", path="x", chat_template=True))
    policy = policy_that_ends_with(tokenizer.eos_token_id)
    check_stop_token(policy, tokenizer)
    with pytest.raises(ConfigError, match=r"ends its responses with '<\|endoftext\|>'.*data.stop_token"):
        check_stop_token(policy, own)
    check_stop_token(policy_that_ends_with(own.eos_token_id, 7), own)
    check_stop_token(tiny_model("llama"), own)


@pytest.mark.parametrize("before", [None, 3])
def test_plain_generate_stops_a_saved_policy_at_its_stop_token(tmp_path, before):
    tokenizer = with_stop_token(
        byte_level(chat_template=CHATML), DataConfig(task="own", path="x", stop_token="<|im_end|>")
    )
    policy = (
        tiny_model("llama", vocab_size=len(tokenizer)) if before is None else policy_that_ends_with(before)
    )
    with torch.no_grad():  # says nothing but the stop token
        policy.lm_head.weight.zero_()
        policy.model.norm.weight.zero_()
    save_policy(policy, tokenizer, tmp_path / "policy", "card")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    stop = tokenizer.eos_token_id
    assert saved.generation_config.eos_token_id == (stop if before is None else [stop, before])
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<|im_end|>"
    assert stop_ids(saved) == ((stop,) if before is None else (stop, before))

    def always_stop(input_ids, scores):
        scores[:] = float("-inf")
        scores[:, stop] = 0
        return scores

    out = saved.generate(
        torch.tensor([[40, 41]]), max_new_tokens=5, logits_processor=[always_stop], pad_token_id=1
    )
    assert out[0].tolist() == [40, 41, stop]


def test_a_model_that_generates_nothing_is_saved_as_it_is():
    write_stop_token(torch.nn.Linear(1, 1), byte_level())


# --- texts of sampled responses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\nfirst", "\n\nfirst", "\n \nfirst", " first", "first", "\n", "- a\n- b\n", "a\n\n"]
)
@pytest.mark.parametrize("make", [byte_level, sentencepiece, lambda: sentencepiece(newlines=True)])
def test_responses_survive_whatever_they_begin_with(text, make):
    tokenizer = make()
    ids = encode_response(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert decode_response(tokenizer, ids[:-1]) == text
    assert readable_texts(tokenizer, [ids], [""]) == [text]
