from __future__ import annotations

import json

import pytest
from tiny_tokenizers import CHATML, WITH_BOS, byte_level

from drpo.data.chat import ChatTemplate, is_conversation, split_conversation
from drpo.data.load import DataConfig, Splits, load_examples
from drpo.data.markup import special_tokens
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


# --- rows of a file -----------------------------------------------------------------------------------------


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def load(rows, folder, view="demonstrations", max_bad_fraction=0.01) -> Splits:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        task="own", path=str(path), chat_template=True, eval_fraction=0, max_bad_fraction=max_bad_fraction
    )
    return load_examples(config, byte_level(chat_template=CHATML), view)


SPELLED = "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"
SAME_TEXT = {
    3: {"prompt": [user(SPELLED)], "completion": [assistant("one turn")]},
    7: {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("three turns")]},
}
"Rows whose prompts are rendered to the same text, by the special tokens that the template wrote in it."


@pytest.mark.parametrize("order", [(3, 7), (7, 3)])
@pytest.mark.parametrize("view", ["demonstrations", "prompts"])
def test_spelled_out_markup_stays_text_beside_a_row_with_real_turns(tmp_path, view, order):
    splits = load([SAME_TEXT[count] for count in order], tmp_path, view)
    special = set(special_tokens(byte_level(chat_template=CHATML)).values())
    assert [sum(i in special for i in example.query_ids) for example in splits.train] == list(order)
    assert splits.train[0].record.prompt == splits.train[1].record.prompt
    assert f"2 {view}, 2 distinct prompts" in splits.report
    again = load([SAME_TEXT[3]] * 2, tmp_path, "prompts")
    assert len(again.train) == 1


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        ({"role": 5, "content": "x"}, "role in message 1 of {} is int, not text"),
        ({"role": ["user"], "content": "x"}, "role in message 1 of {} is list, not text"),
        ({"role": None, "content": "x"}, "no role in message 1 of {}"),
        ({"content": "x"}, "no role in message 1 of {}"),
        ({"role": "", "content": "x"}, "role in message 1 of {}"),
        ({"role": "user\ud800", "content": "x"}, "role in message 1 of {} holds half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "messages", "chosen"])
def test_a_message_without_a_usable_role_is_a_bad_row(tmp_path, field, message, detail):
    good = {"prompt": [user("why?")], "completion": [assistant("because")]}
    rest = [assistant("yes")] if field != "prompt" else []
    bad = {field: [message, *rest], **({"completion": "yes"} if field == "prompt" else {})}
    report = load([good, bad], tmp_path, max_bad_fraction=0.5).report
    assert "rows.jsonl: 2 rows read, 1 bad" in report
    assert f"rows.jsonl:2: {detail.format(field)}" in report


@pytest.mark.parametrize(
    ("prompt", "detail"),
    [
        ([user("half \ud800")], "the content of a 'user' message holds half of a surrogate pair"),
        ([assistant("\udfff"), user("x")], "the content of a 'assistant' message holds half of"),
        ([user("x"), "text"], "message 2 of prompt is str, not an object with role and content"),
        ([user("x"), None], "message 2 of prompt is NoneType, not an object with role and content"),
        ([user(5)], "the content of a 'user' message is not text"),
    ],
)
def test_a_message_without_usable_content_is_a_bad_row(tmp_path, prompt, detail):
    rows = [
        {"prompt": [user("why?")], "completion": [assistant("because")]},
        {"prompt": prompt, "completion": "yes"},
    ]
    assert f"rows.jsonl:2: {detail}" in load(rows, tmp_path, max_bad_fraction=0.5).report


def test_a_key_of_a_message_that_the_template_writes_must_have_utf_8():
    named = CHATML.replace("{{ message.role }}", "{{ message.role }}{{ message.name }}")
    chat = ChatTemplate(byte_level(chat_template=named))
    with pytest.raises(RowError, match="invalid text: what the chat template makes of the messages"):
        chat.render([{**user("hi"), "name": "\ud800"}], ["x"])
