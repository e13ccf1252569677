"""The chat templates of real model families, as TRL ships them: what is trained on is what the template itself
writes, tokenised with its special tokens, or the template is refused with the property that it lacks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from tiny_tokenizers import with_markup

from drpo.data.chat import ChatTemplate
from drpo.data.encode import encode_prompts, encode_responses
from drpo.data.files import Row
from drpo.data.load import DataConfig
from drpo.data.records import DataError, RowError
from drpo.data.stop import with_stop_token
from drpo.data.tasks.own import own_record
from drpo.data.template_arguments import check_arguments

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NO_THOUGHT = {"enable_thinking": False}
GENERATION_PROMPT = "renders the prompt otherwise when a response follows"
NO_TEXT = "does not render the user's message, a text"
ENDS = {  # the token that ends the assistant's turn, or what refuses the template
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|>",
    "deepseek_r1_distill": GENERATION_PROMPT,
    "deepseekv3": GENERATION_PROMPT,
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": NO_TEXT,
    "lfm2": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>",
    "lfm2_2_5_vl": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "llava_next": "cannot be used: 'str object' has no attribute 'text'",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_5_lightning": GENERATION_PROMPT,
    "nemotron_3_nano": GENERATION_PROMPT,
    "nemotron_3_super": GENERATION_PROMPT,
    "nemotron_3_ultra": GENERATION_PROMPT,
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "smolvlm": NO_TEXT,
}
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
NEWLINES_MEET = {"qwen3_5_think", "qwen3_6", "qwen3_8"}
"Their prompt ends and a reply without thoughts begins with a newline, which only a whole text would merge."
CONVERSATIONS = [
    [{"role": "user", "content": "Name a metal."}],
    [
        {"role": "user", "content": "Name a metal."},
        {"role": "assistant", "content": "Lead."},
        {"role": "user", "content": "\nAnother one, please:\n\n"},
    ],
]
CHAT = DataConfig(task="own", path="x", chat_template=True)
REPLIES = ["Iron.", "Iron\n\n  or tin, <b>not</b> wood", "(1) 鉄"]


def family(name: str) -> str:
    """The name without what TRL adds for its variants."""
    return re.sub(r"(_v\d|_training)+$", "", name)


def tokenizer_of(name: str):
    return with_markup((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def usable(name: str) -> bool:
    return ENDS[family(name)].startswith("<")


def reads_thinking(name: str) -> bool:
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return "enable_thinking" in re.sub(r"{#.*?#}", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_argument_that_a_template_does_not_read_is_refused(name):
    check_arguments(tokenizer_of(name), NO_THOUGHT if reads_thinking(name) else ())
    unread = {"enable_thinkin"} if reads_thinking(name) else NO_THOUGHT
    with pytest.raises(DataError, match="does not read it"):
        check_arguments(tokenizer_of(name), unread)


def test_the_table_knows_every_template():
    assert {family(name) for name in TEMPLATES} == set(ENDS) and len(TEMPLATES) > 60


def record_of(chat: ChatTemplate, messages, reply):
    row = Row({"prompt": messages, "completion": [{"role": "assistant", "content": reply}]}, "rows.jsonl:1")
    return own_record(row, {}, chat)


def trained_on(tokenizer, record) -> list[int]:
    (query,) = encode_prompts(tokenizer, [record.marked_prompt])
    (response,) = encode_responses(tokenizer, [record.completion], record.chat.opening)
    return query + response


def written(tokenizer, messages, reply, end, arguments) -> list[int]:
    """The template's own tokens of the whole conversation, up to the end of the reply's turn."""
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": reply}], tokenize=False, **arguments
    )
    place = whole.rindex(reply) + len(reply)
    before = whole[: whole.index(end, place)] if end in whole[place:] else whole
    return tokenizer(before + end, add_special_tokens=False).input_ids


def cases():
    for name in TEMPLATES:
        if usable(name):
            yield name, {}
            if reads_thinking(name):
                yield name, NO_THOUGHT
        elif "nemotron" in name:
            yield name, NO_THOUGHT


@pytest.mark.parametrize(("name", "arguments"), cases())
def test_a_training_text_is_what_the_template_writes(name, arguments):
    tokenizer = tokenizer_of(name)
    end = ENDS[family(name)] if usable(name) else "<|im_end|>"
    chat = ChatTemplate(tokenizer, arguments)
    config = DataConfig(task="own", path="x", chat_template=True, chat_template_kwargs=arguments)
    assert chat.stop_token == end
    stopping = with_stop_token(tokenizer, config)
    assert stopping.eos_token == end and tokenizer.eos_token == "<|endoftext|>"
    for messages in CONVERSATIONS:
        for reply in REPLIES:
            record = record_of(chat, messages, reply)
            expected = written(tokenizer, messages, reply, end, arguments)
            own, expected = trained_on(stopping, record), written(tokenizer, messages, reply, end, arguments)
            assert tokenizer.decode(own) == tokenizer.decode(expected)
            if arguments or family(name) not in NEWLINES_MEET:
                assert own == expected
            asked = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **arguments
            )
            asked_ids = tokenizer(asked, add_special_tokens=False).input_ids
            assert record.prompt == asked and own[: len(asked_ids)] == asked_ids
            assert record.without_opening(record.completion).strip() == reply


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not usable(name)])
def test_a_template_without_a_property_is_refused_by_it(name):
    with pytest.raises(DataError, match=ENDS[family(name)]) as error:
        ChatTemplate(tokenizer_of(name))
    assert ("chat_template_kwargs={enable_thinking: false}" in str(error.value)) == ("nemotron" in name)


def wrong(name: str, reply: str, **options) -> RowError | None:
    chat = ChatTemplate(tokenizer_of(name), **options)
    try:
        record_of(chat, CONVERSATIONS[0], reply)
    except RowError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink", "qwen3_6", "glm4moe"])
def test_a_reply_that_the_template_rearranges_is_told(name):
    error = wrong(name, "The tag </think> ends a thought.")
    told = "renders the prompt otherwise" if name == "qwen3_5_nothink" else "leaves out or rearranges"
    assert error.kind == "chat template" and told in error.detail


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6"])
def test_thoughts_that_a_template_keeps_are_trained_on(name):
    """Also where the prompt opens them already: the response is what the model then writes."""
    tokenizer = tokenizer_of(name)
    chat = ChatTemplate(tokenizer)
    reply = "<think>\nIt shines.\n</think>\n\nIron."
    record = record_of(chat, CONVERSATIONS[0], reply)
    assert (record.prompt + record.completion).endswith(reply)
    assert record.prompt.endswith("<think>\n") == record.completion.startswith("It shines.")
    expected = written(tokenizer, CONVERSATIONS[0], reply, "<|im_end|>", {})
    assert trained_on(with_stop_token(tokenizer, CHAT), record) == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if usable(name)])
def test_keys_without_a_value_are_no_keys(name):
    """What a columnar file gives to all messages, once one of them has the key."""
    empty = {"tool_calls": None, "thinking": None, "name": None}
    chat = ChatTemplate(tokenizer_of(name))
    for messages in CONVERSATIONS:
        padded = [{**message, **empty} for message in messages]
        row = Row(
            {"prompt": padded, "completion": [{"role": "assistant", "content": "Tin.", **empty}]},
            "rows.jsonl:1",
        )
        assert own_record(row, {}, chat) == record_of(chat, messages, "Tin.")


def test_whatever_a_template_raises_is_a_bad_row():
    template = "{% for m in messages %}{{ m.content + (m.note | d('')) }}<|end|>{% endfor %}"
    with pytest.raises(DataError, match="cannot be used: TypeError"):
        ChatTemplate(with_markup("{{ messages | length + 'a' }}" + template))
    chat = ChatTemplate(with_markup(template))
    with pytest.raises(RowError, match="TypeError") as error:
        chat.render([{"role": "user", "content": "a", "note": 3}], ["b"])
    assert error.value.kind == "chat template"


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "gptoss", "phi3", "cohere"])
def test_special_tokens_that_somebody_spells_out_are_ordinary_text(name):
    """In a question and in a reply: the special tokens of the training text are the template's own."""
    tokenizer = tokenizer_of(name)
    end = ENDS[family(name)]
    chat = ChatTemplate(tokenizer)
    question = [{"role": "user", "content": f"{end} What is {end}?"}]
    plain = [{"role": "user", "content": "What is it?"}]
    record, other = record_of(chat, question, f"A token: {end}."), record_of(chat, plain, "A token.")
    stopping = with_stop_token(tokenizer, CHAT)
    own, expected = trained_on(stopping, record), trained_on(stopping, other)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert [i for i in own if i in special] == [i for i in expected if i in special]
    assert tokenizer.decode(own) == record.prompt + record.completion + end
    assert question[0]["content"] in record.prompt


def test_a_reply_with_more_than_a_text_is_a_bad_row():
    chat = ChatTemplate(tokenizer_of("qwen3"))
    reply = {"role": "assistant", "content": "Iron.", "reasoning_content": "It shines."}
    with pytest.raises(RowError, match="has reasoning_content"):
        own_record(Row({"prompt": CONVERSATIONS[0], "completion": [reply]}, "r:1"), {}, chat)
