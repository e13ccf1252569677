"""The keys of stored answers, by value: a paid answer stays valid while its key stays the same. Other prompts."""

from __future__ import annotations

import pytest

from eval.judging.judges import JudgeConfig
from eval.judging.matchup import Matchup, Question
from eval.judging.openai.answer import Unreadable, parse_answer
from eval.judging.openai.pairwise import PROMPTS
from eval.judging.openai.request import JudgeSetup

MATCHUP = Matchup("id", "POST: my hat\nTL;DR:", "x", " lost hat\n", "y", "  found hat")
PLAIN = {"model": "gpt-5.4-mini"}
LOCAL = {
    "model": "gpt-5.4-mini",
    "base_url": "http://localhost:8000/v1/",
    "temperature": None,
    "reasoning_effort": "low",
    "output_limit": "max_tokens",
}


@pytest.mark.parametrize(
    ("prompt", "form", "key"),
    [
        ("tldr-1", "json", "9f31bd2cc327d75027062de57f17a13bb7cd398a2166a1f4791487183823ca5a"),
        ("tldr-1", "text", "135d2c8fa7ddfb0a52dc780163d1bb63572984207b818509ebcb9e950a4fac0e"),
        ("hh_helpful-1", "json", "1834bef60f376a37d67090b440aa5ee7f0d62f1d2a721880ba8c2a09e6d0f375"),
        ("hh_helpful-1", "text", "3c608eb97787f286caee52501370ee05122a55ba5b34263b9b6960b8d7f687c1"),
        ("hh_harmless-1", "json", "2bf8152f990acb5a182dc053deb731efad6f514c2a06dc141cc5bd14be253131"),
        ("hh_harmless-1", "text", "299c7803993e3026cc810486e42702062f09fe4c3f3d351131204f8c37ebe314"),
    ],
)
def test_keys_of_first_questions_are_those_of_stored_answers(prompt, form, key):
    setup = JudgeSetup(JudgeConfig(**PLAIN, form=form), PROMPTS[prompt], True, form, None)
    assert setup.request(Question(MATCHUP, "ab"), 0).key == key


@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("json", "014b1ddcb2b4c18a1cd4f3fca0af6fb38786cf25d5bf6ca5aab72cc7e705a908"),
        ("text", "986fd6ec354f8fdcbaa5f9ed1fa5c50dc099eba6ec640dce65ed7adc365d96ad"),
    ],
)
def test_keys_of_other_settings_are_those_of_stored_answers(form, key):
    setup = JudgeSetup(JudgeConfig(**LOCAL, form=form), PROMPTS["tldr-1"], False, form, None)
    assert setup.request(Question(MATCHUP, "ba"), 1).key == key


class YesOrNo:
    """Another way of asking: whether the first response is better than the second."""

    def messages(self, question, form, ties, sample):
        first, second = question.matchup.shown(question.order)
        return [
            {"role": "user", "content": f"Is {first.strip()!r} better than {second.strip()!r}? ({sample})"}
        ]

    def response_format(self, ties):
        return {"type": "yes or no"}

    def parse(self, answer, form, ties):
        def read_slot(text):
            if text not in ("yes", "no"):
                raise Unreadable(f"neither yes nor no: {text}")
            return "first" if text == "yes" else "second"

        return parse_answer(answer, form, read_slot)


@pytest.mark.parametrize(
    ("text", "status", "winner"),
    [
        ("yes", "ok", "b"),
        ("<think>yes</think> no", "ok", "a"),
        ("maybe", "malformed", None),
        ("I'm sorry, but I cannot judge this.", "refused", None),
    ],
)
def test_another_way_of_asking_is_sent_and_read(text, status, winner):
    config = JudgeConfig(model="m", form="text")
    setup, question = JudgeSetup(config, YesOrNo(), True, "text", None), Question(MATCHUP, "ba")
    request = setup.request(question, 0)
    assert request.body["messages"] == [
        {"role": "user", "content": "Is 'found hat' better than 'lost hat'? (0)"}
    ]
    payload = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    verdict = setup.verdict(question, [setup.answered(request, payload, "live")])
    assert (verdict.status, verdict.winner) == (status, winner)
