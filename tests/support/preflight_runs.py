"""The checks before a judge's first question, run against the stub server."""

from __future__ import annotations

import asyncio
from contextlib import closing
from datetime import date

from judge_runs import PATIENT, judge_config, judge_setup
from openai import AsyncOpenAI
from stub_judge_server import (
    KEY,
    StubServer,
)

from eval.judging.judges import JudgeConfig
from eval.judging.openai.budget import Budget, BudgetConfig
from eval.judging.openai.openai_judge import OpenAIJudge
from eval.judging.openai.preflight import check_model, probe_form
from eval.judging.openai.rate_limit import RateLimiter
from eval.judging.openai.retry import RetryConfig
from eval.judging.openai.store import Store

TODAY = date(2026, 11, 20)


def check(server: StubServer, key: str = KEY, config: JudgeConfig | None = None) -> list[str]:
    """What the check of the model says; raises what it raises. The client always asks the stub."""
    said: list[str] = []
    config = config or judge_config(server)

    async def run():
        async with AsyncOpenAI(api_key=key, base_url=server.url, max_retries=0, timeout=20) as client:
            await check_model(client, config, said.append, TODAY)

    asyncio.run(run())
    return said


def probe(server: StubServer, store_path, config: JudgeConfig, retry: RetryConfig = PATIENT):
    """The form that the probe finds, and what it says."""
    said: list[str] = []

    async def run(store):
        async with AsyncOpenAI(api_key=KEY, base_url=config.url, max_retries=0, timeout=20) as client:
            budget, limiter = Budget(store, BudgetConfig()), RateLimiter(None)

            def make(asked):
                return OpenAIJudge(client, asked, store, budget, limiter, retry, 1)

            return await probe_form(make, judge_setup(config), store, said.append)

    with closing(Store(store_path)) as store:
        return asyncio.run(run(store)), said
