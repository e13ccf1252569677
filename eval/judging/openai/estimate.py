"""Estimate the cost of a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from drpo.run.stopped import RunStopped
from eval.judging.matchup import Question
from eval.judging.openai.prices import prompt_tokens_about
from eval.judging.openai.request import JudgeSetup
from eval.judging.openai.store import Store


@dataclass(frozen=True, slots=True)
class Estimate:
    """Numbers and cost of the questions that are still open, each asked once."""

    num_questions: int
    num_stored: int
    "Questions answered by the store."
    num_repeats: int
    "Questions that repeat another one: equal responses, in either order."
    prompt_tokens_about: float
    answer_tokens_about: float | None
    "Tokens of an answer, from those in the store; None before the first."
    usd_about: float | None
    "Cost at that answer length; None without a price or a first answer."
    usd_at_most: float | None
    "Upper bound: one token per prompt byte, every answer of maximum length. None without a price."
    price_as_of: str | None

    @property
    def num_calls(self) -> int:
        """Number of calls, if every answer can be read."""
        return self.num_questions - self.num_stored - self.num_repeats

    def text(self) -> str:
        """Format the estimate on one line."""
        parts = [
            f"{self.num_questions} questions, {self.num_stored} of them answered in the store"
            + (f", {self.num_repeats} the same as others" if self.num_repeats else "")
            + f": {self.num_calls} calls, about {self.prompt_tokens_about:,.0f} prompt tokens"
        ]
        if self.answer_tokens_about is not None:
            parts.append(f"about {self.answer_tokens_about * self.num_calls:,.0f} answer tokens")
        if self.usd_about is not None:
            parts.append(f"about ${self.usd_about:.2f}")
        if self.usd_at_most is None:
            parts.append("no price known")
        else:
            parts.append(f"at most ${self.usd_at_most:.2f} (prices of {self.price_as_of})")
        return ", ".join(parts) + "; retries and questions asked again come on top"


def total_text(estimates: Sequence[Estimate]) -> str:
    """Add up several estimates and format them; questions that two of them share count twice."""
    calls = sum(each.num_calls for each in estimates)
    tokens = sum(each.prompt_tokens_about for each in estimates)
    parts = [f"at most {calls} calls, about {tokens:,.0f} prompt tokens"]
    for name, word in (("usd_about", "about"), ("usd_at_most", "at most")):
        dollars = [getattr(each, name) for each in estimates]
        if None not in dollars:
            parts.append(f"{word} ${sum(dollars):.2f}")
    return ", ".join(parts)


def estimate(setup: JudgeSetup, questions: Sequence[Question], store: Store) -> Estimate:
    """Estimate the cost of these questions; those that the store answers cost nothing."""
    next_requests = [setup.unanswered(question, store)[0] for question in questions]
    unanswered = [request for request in next_requests if request is not None]
    requests = {request.key: request for request in unanswered}.values()
    num_open = len(requests)
    prompt_tokens = sum(prompt_tokens_about(request.texts) for request in requests)
    answers = [
        call.completion_tokens
        for call in store.calls()
        if call.model == setup.config.model and call.completion_tokens is not None
    ]
    answer_tokens = fmean(answers) if answers else None
    price = setup.price
    about = None
    if price is not None and answer_tokens is not None:
        about = (prompt_tokens * price.input + num_open * answer_tokens * price.output) / 1e6
    return Estimate(
        len(questions),
        len(questions) - len(unanswered),
        len(unanswered) - num_open,
        prompt_tokens,
        answer_tokens,
        about,
        None if price is None else sum(setup.max_usd(request) for request in requests),
        None if price is None else price.as_of,
    )


class DryRun(RunStopped):
    """A dry run ended before asking anything; `estimate` is the cost of asking."""

    def __init__(self, estimate: Estimate) -> None:
        super().__init__("budget.dry_run: nothing was asked")
        self.estimate = estimate
