"""Arguments of a chat template: those that it reads, and no others."""

from __future__ import annotations

import inspect

import pytest
from tiny_tokenizers import CHATML, byte_level
from transformers import PreTrainedTokenizerBase

from drpo.data.load import DataConfig
from drpo.data.records import DataError
from drpo.data.stop import template_of
from drpo.data.template_arguments import RESERVED, check_arguments, template_variables

THOUGHT = CHATML + "{% if enable_thinking is defined and not enable_thinking %}{% endif %}"


def config(**arguments) -> DataConfig:
    return DataConfig(task="own", path="x", chat_template=True, chat_template_kwargs=arguments)


def test_a_misspelt_name_is_refused_with_the_names_there_are():
    tokenizer = byte_level(chat_template=THOUGHT)
    assert template_of(config(enable_thinking=False), tokenizer) is not None
    with pytest.raises(
        DataError, match=r"^chat_template_kwargs.enable_thinkin: .* the template reads enable_thinking$"
    ):
        template_of(config(enable_thinkin=False), tokenizer)
    with pytest.raises(DataError, match="the template reads no arguments"):
        template_of(config(enable_thinking=False), byte_level(chat_template=CHATML))


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_what_is_no_argument_of_the_template_is_refused(name):
    with pytest.raises(ValueError, match=f"^chat_template_kwargs.{name} is not the template's own"):
        config(**{name: True})


def test_every_argument_of_transformers_is_reserved():
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert taken.keys() - {"self", "kwargs"} <= RESERVED


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ date }}", {"date"}),
        ("{% if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}", {"date"}),
        ("{% set think = think if think is defined else true %}{{ think }}", {"think"}),
        (
            "{% macro show(text) %}{{ text }}{{ style }}{% endmacro %}{{ show(messages[0].content) }}",
            {"style"},
        ),
        (
            "{% set ns = namespace(x=1) %}{% for m in messages %}{{ m.a }}{{ loop.index }}{{ ns.x }}{% endfor %}",
            set(),
        ),
        ("{% for m in messages %}{% if stop %}{% break %}{% endif %}{% endfor %}", {"stop"}),
        ("{%- generation -%}{{ a }}{% endgeneration %}{{ raise_exception('no') if tools else '' }}", {"a"}),
        ("{{ bos_token }}", {"bos_token"}),
    ],
)
def test_the_names_that_a_template_reads(template, names):
    assert template_variables(template) == names


def test_of_named_templates_the_default_counts():
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": THOUGHT, "rag": CHATML + "{{ citations }}"}
    check_arguments(tokenizer, {"enable_thinking": False})
    with pytest.raises(DataError, match="citations"):
        check_arguments(tokenizer, {"citations": True})


@pytest.mark.parametrize("template", [None, "{% for m in"])
def test_without_a_usable_template_the_error_is_that_of_the_template(template):
    tokenizer = byte_level(chat_template=template)
    check_arguments(tokenizer, {"anything": 1})
    with pytest.raises(DataError, match="chat template"):
        template_of(config(anything=1), tokenizer)
