"""Judging against the stub server in this process, through the real client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI
from stub_judge_server import KEY, MODEL, StubServer

from eval.completions.rows import prompt_id_of
from eval.judging.judge import JudgeStopped
from eval.judging.judges import JudgeConfig
from eval.judging.matchup import Matchup, Question, questions_of
from eval.judging.openai.batch_api import BatchAPIConfig, BatchJudge
from eval.judging.openai.budget import Budget, BudgetConfig
from eval.judging.openai.openai_judge import OpenAIJudge
from eval.judging.openai.pairwise import PROMPTS
from eval.judging.openai.prices import Price
from eval.judging.openai.rate_limit import LimitsConfig, RateLimiter
from eval.judging.openai.request import JudgeSetup
from eval.judging.openai.retry import RetryConfig
from eval.judging.openai.store import Call, Ledger, Store
from eval.judging.verdict import Judgment, Verdict, combine_all

PRICE = Price(input=10.0, cached=1.0, cache_write=10.0, output=100.0, as_of="now")
PATIENT = RetryConfig(timeout=20.0, max_attempts=4, max_elapsed=20.0, base_delay=0.01, max_delay=0.02)
QUICK = BatchAPIConfig(poll_seconds=0.01)


def matchups(num: int = 6) -> list[Matchup]:
    """Posts of three facts: system a summarises all of them, b one and says so at length."""
    made = []
    for i in range(num):
        facts = [f"{word}{i:03d}" for word in ("rabbit", "window", "ladder")]
        post = f"POST: my {facts[0]} broke the {facts[1]} with a {facts[2]}, what now?\nTL;DR:"
        good = f" {' '.join(facts)}"
        long = f" something about {facts[0]}, as the author goes on and on and on telling everybody around"
        made.append(Matchup(prompt_id_of(post), post, "good", good, "long", long))
    return made


def judge_setup(
    config: JudgeConfig, prompt: str = "tldr-1", ties: bool = True, price: Price | None = PRICE
) -> JudgeSetup:
    return JudgeSetup(config, PROMPTS[prompt], ties, "json" if config.form == "auto" else config.form, price)


def judge_config(server: StubServer, **changes) -> JudgeConfig:
    known = {"model": MODEL, "base_url": server.url, "form": "json", "max_output_tokens": 100}
    return JudgeConfig(**{**known, **changes})


@dataclass
class Run:
    """What a run left."""

    verdicts: list[Verdict]
    stopped: JudgeStopped | None
    calls: list[Call]
    ledger: Ledger

    orders: str = "both"

    @property
    def judgments(self) -> list[Judgment]:
        return combine_all(sorted(self.verdicts, key=lambda v: (v.prompt_id, v.order)), "half", self.orders)

    @property
    def rate(self) -> float:
        scores = [judgment.score for judgment in self.judgments]
        assert None not in scores
        return sum(scores) / len(scores)

    def statuses(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            counts[verdict.status] = counts.get(verdict.status, 0) + 1
        return counts


def judge(
    server: StubServer,
    store: Path,
    compared: Sequence[Matchup] | None = None,
    *,
    questions: Sequence[Question] | None = None,
    config: JudgeConfig | None = None,
    prompt: str = "tldr-1",
    ties: bool = True,
    price: Price | None = PRICE,
    budget: BudgetConfig | None = None,
    limits: LimitsConfig | None = None,
    retry: RetryConfig = PATIENT,
    key: str = KEY,
) -> Run:
    """Ask the questions (both orders of every matchup) and return what is known then."""
    if questions is None:
        questions = questions_of(matchups() if compared is None else compared, "both", 0)
    config = config or judge_config(server)
    limits = limits or LimitsConfig()

    async def ask() -> tuple[list[Verdict], JudgeStopped | None]:
        client = AsyncOpenAI(api_key=key, base_url=config.url, max_retries=0, timeout=retry.timeout)
        async with client:
            judge = OpenAIJudge(
                client,
                judge_setup(config, prompt, ties, price),
                open_store,
                Budget(open_store, budget or BudgetConfig()),
                RateLimiter(limits.requests_per_minute),
                retry,
                limits.concurrency,
            )
            verdicts: list[Verdict] = []
            try:
                async for verdict in judge.verdicts(questions):
                    verdicts.append(verdict)
            except JudgeStopped as error:
                return verdicts, error
            return verdicts, None

    with closing(Store(store)) as open_store:
        verdicts, stopped = asyncio.run(ask())
        return Run(verdicts, stopped, open_store.calls(), open_store.ledger())


def judge_by_batch(
    server: StubServer,
    store_path,
    compared=None,
    config: BatchAPIConfig = QUICK,
    budget: BudgetConfig | None = None,
    judge_settings: JudgeConfig | None = None,
    prepare: Callable[[BatchJudge], None] = lambda judge: None,
) -> Run:
    """Ask by batches; `prepare` may change the judge before it starts."""
    questions = questions_of(matchups(4) if compared is None else compared, "both", 0)
    settings = judge_settings or judge_config(server, backend="batch")

    async def run(open_store):
        async with AsyncOpenAI(api_key=KEY, base_url=settings.url, max_retries=0, timeout=20) as client:
            spending = Budget(open_store, budget or BudgetConfig())
            made = BatchJudge(
                client, judge_setup(settings), open_store, spending, config, PATIENT, lambda text: None
            )
            prepare(made)
            verdicts = []
            try:
                async for verdict in made.verdicts(questions):
                    verdicts.append(verdict)
            except JudgeStopped as stopped:
                return verdicts, stopped
            return verdicts, None

    with closing(Store(store_path)) as open_store:
        verdicts, stopped = asyncio.run(run(open_store))
        return Run(verdicts, stopped, open_store.calls(), open_store.ledger())
