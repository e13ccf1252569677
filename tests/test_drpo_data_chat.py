from __future__ import annotations

import pytest
from tiny_tokenizers import CHATML, WITH_BOS, byte_level

from drpo.data.chat import ChatTemplate, is_conversation, split_conversation
from drpo.data.records import DataError, RowError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "because"},
    {"role": "user", "content": "really?"},
]
# Templates may treat the last turn in their own way: an empty thought before it (Qwen 3), or two ways of ending.
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n{% endif %}").replace(
    "{{ message.content | trim }}",
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)


def test_prompt_and_response_are_the_templates_text_without_its_closing():
    chat = ChatTemplate(byte_level(chat_template=WITH_BOS))
    prompt, responses = chat.render(TURNS, ["yes", "no <|im_end|>"])
    assert prompt == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\nbecause<|im_end|>\n<|im_start|>user\nreally?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert responses == ["yes", "no <|im_end|>"]


def test_what_the_template_puts_before_a_response_belongs_to_the_response():
    _, responses = ChatTemplate(byte_level(chat_template=THINKING)).render(TURNS, [" sure "])
    assert responses == ["<think>\n\n</think>\n\n sure "]


@pytest.mark.parametrize(
    ("turns", "kind"),
    [
        ([], "missing field"),
        (TURNS[:3], "missing field"),
        ([{"role": "user", "content": None}], "wrong type"),
        ([{"role": "user", "content": [{"type": "image"}]}], "wrong type"),
    ],
)
def test_conversations_that_cannot_be_answered(turns, kind):
    with pytest.raises(RowError) as error:
        ChatTemplate(byte_level(chat_template=CHATML)).render(turns, ["x"])
    assert error.value.kind == kind


def test_a_conversation_that_the_template_refuses():
    strict = "{% if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    chat = ChatTemplate(byte_level(chat_template=strict))
    chat.render(TURNS[1:2], ["x"])
    with pytest.raises(RowError, match="too many turns") as error:
        chat.render(TURNS, ["x"])
    assert error.value.kind == "chat template"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (
            "{% for message in messages[:1] %}{{ message.content }}{% endfor %}",
            "does not render the assistant",
        ),
        ("{{ messages | length }}" + CHATML, "renders the prompt otherwise"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_at_once(template, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(byte_level(chat_template=template))


def test_what_is_a_conversation():
    assert is_conversation(TURNS)
    for value in (None, "text", [], ["text"], [{"content": "x"}], {"role": "user"}):
        assert not is_conversation(value)


def test_only_a_conversation_that_ends_with_the_assistant_has_a_response():
    assert split_conversation(TURNS[:3]) == (TURNS[:2], "because")
    with pytest.raises(RowError) as error:
        split_conversation(TURNS)
    assert error.value.kind == "no assistant turn"
    with pytest.raises(RowError) as error:
        split_conversation([TURNS[1], {"role": "assistant", "content": " "}])
    assert error.value.kind == "empty text"
