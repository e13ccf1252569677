"""Prices by kind of token, bounds that hold, and caps that many workers cannot pass together."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing

import pytest
import yaml

from drpo.config import ConfigError
from eval.judging.openai.budget import Budget, BudgetConfig, BudgetReached
from eval.judging.openai.prices import (
    PRICES,
    Price,
    load_price,
    prompt_tokens_about,
    prompt_tokens_at_most,
)
from eval.judging.openai.store import Store

TABLE = {
    "as_of": "a day",
    "batch_factor": 0.5,
    "models": {"m": {"input": 2.0, "cached": 0.5, "output": 8.0}, "m-mini": {"input": 1.0, "output": 3.0}},
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(TABLE))
    return path


@pytest.fixture
def store(tmp_path):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        yield store


# --- prices -----------------------------------------------------------------------------------------------


def test_each_kind_of_token_has_its_price(table):
    price = load_price(table, "m", batch=False)
    # 1000 prompt tokens: 700 plain, 300 cached; thoughts are part of the 50 answer tokens
    assert price.cost(1000, 300, 0, 50) == pytest.approx((700 * 2 + 300 * 0.5 + 50 * 8) / 1e6)
    assert load_price(table, "m-mini", batch=False).cost(10, 10, 0, 0) == pytest.approx(10e-6)
    half = load_price(table, "m", batch=True)
    assert half.cost(1000, 300, 0, 50) == pytest.approx((700 + 75 + 200) / 1e6)


def test_a_name_covers_its_snapshots_and_nothing_else(table):
    """A table looked up by a part of the name bills one model at another's price."""
    assert load_price(table, "m-2026-03-05", batch=False) == load_price(table, "m", batch=False)
    assert load_price(table, "m-mini-2026-03-05", batch=False).input == 1.0
    for other in ("m-pro", "m-mini-high", "xm", "m-2026", "M"):
        assert load_price(table, other, batch=False) is None


def test_the_table_of_the_package_is_read():
    table = yaml.safe_load(PRICES.read_text())
    for name in table["models"]:
        price = load_price(PRICES, name, batch=False)
        assert 0 < price.cached <= price.input < price.output and price.as_of == table["as_of"]


@pytest.mark.parametrize(
    "change",
    [
        {"models": {"m": {"input": 1.0}}},
        {"models": {"m": {"input": "1", "output": 1.0}}},
        {"models": {"m": {"input": -1.0, "output": 1.0}}},
        {"models": {"m": {"input": 1.0, "output": 1.0, "thoughts": 1.0}}},
        {"models": [1]},
        {"batch_factor": None},
        {"as_of": "left out"},
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(tmp_path, change):
    table = {k: v for k, v in {**TABLE, **change}.items() if v != "left out"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ConfigError, match="budget.prices=.* is not a table of prices"):
        load_price(tmp_path / "p.yaml", "m", batch=True)


def test_the_bound_on_tokens_holds_for_a_real_tokenizer():
    """A byte-level tokenizer without any merges is the worst there is: one token for each byte."""
    texts = ["Hello, wörld! 你好 😀" * 3, ""]
    worst = sum(len(text.encode()) for text in texts)
    assert prompt_tokens_at_most(texts) >= worst + 2 * 8
    assert prompt_tokens_about(["word " * 100]) == pytest.approx(129)


def test_the_bound_on_dollars_takes_the_dearest_kind():
    price = Price(input=2.0, cached=0.5, cache_write=2.5, output=8.0, as_of="")
    assert price.at_most(1000, 100) == pytest.approx((1000 * 2.5 + 100 * 8) / 1e6)


# --- caps -------------------------------------------------------------------------------------------------


def spend(store: Store, config: BudgetConfig, costs: list[tuple[float, float]], num_workers: int, seed: int):
    """Workers that reserve, wait and pay: (reserved, paid) of each call. What was paid and reserved at each moment."""
    budget = Budget(store, config)
    rng, seen, refused = random.Random(seed), [], []
    pending = iter(enumerate(costs))

    async def work():
        for i, (most, cost) in pending:
            try:
                reservation = await budget.reserve(str(i), most)
            except BudgetReached as error:
                refused.append(str(error))
                return
            seen.append(budget.spent + budget.reserved)
            await asyncio.sleep(rng.random() * 0.003)
            await budget.settle(reservation, cost, "answered")
            seen.append(budget.spent + budget.reserved)

    async def all_of_them():
        await asyncio.gather(*(work() for _ in range(num_workers)))

    asyncio.run(all_of_them())
    return budget, seen, refused


@pytest.mark.parametrize("seed", range(5))
def test_money_spent_and_reserved_never_passes_the_cap(store, seed):
    rng = random.Random(seed)
    mosts = [rng.uniform(0.5, 1.5) for _ in range(200)]
    costs = [(most, most * rng.choice([0.1, 0.5, 1.0])) for most in mosts]
    budget, seen, refused = spend(store, BudgetConfig(max_usd=10.0), costs, 16, seed)
    assert max(seen) <= 10.0 and refused
    assert budget.spent > 10.0 - 1.5 - 1e-9, "it waits for reservations to come free, and uses the money"
    assert store.ledger().usd == pytest.approx(budget.spent) and budget.reserved == 0


def test_calls_are_capped_exactly(store):
    budget, _, refused = spend(store, BudgetConfig(max_calls=23), [(1.0, 1.0)] * 100, 10, 0)
    assert budget.num_requests == 23 == store.ledger().num_requests and len(refused) == 10
    assert "would pass budget.max_calls=23" in refused[0]


def test_earlier_runs_count_and_so_does_what_they_left_open(store):
    spend(store, BudgetConfig(), [(1.0, 0.25)] * 4, 2, 0)
    store.open_requests([("killed", 2.0)])
    budget = Budget(store, BudgetConfig(max_usd=4.0))
    assert (budget.spent, budget.num_requests) == (3.0, 5)
    _, _, refused = spend(store, BudgetConfig(max_usd=4.0), [(1.0, 1.0), (0.5, 0.5)], 1, 0)
    assert len(refused) == 1 and "$4.0000 are spent" in refused[0]


def test_what_was_not_sent_is_given_back(store):
    async def reserve_and_withdraw():
        budget = Budget(store, BudgetConfig(max_calls=1, max_usd=1.0))
        reservation = await budget.reserve("a", 1.0)
        await budget.withdraw(reservation)
        return budget, await budget.reserve("b", 1.0)

    budget, _ = asyncio.run(reserve_and_withdraw())
    assert budget.num_requests == 1 == store.ledger().num_requests and budget.reserved == 1.0


def test_a_batch_is_reserved_whole_or_not_at_all(store):
    budget = Budget(store, BudgetConfig(max_usd=5.0))
    budget.reserve_batch([("a", 1.0), ("b", 2.0)], "batch")
    with pytest.raises(BudgetReached, match="the next 2 requests could cost"):
        budget.reserve_batch([("c", 1.0), ("d", 1.5)], "batch 2")
    assert store.ledger().num_requests == 2
    for reservation in store.open_requests_of("batch").values():
        asyncio.run(budget.settle(reservation, 0.5, "answered"))
    assert budget.spent == 1.0 == store.ledger().usd
    budget.reserve_batch([("c", 1.0), ("d", 1.5)], "batch 2")
    later = Budget(store, BudgetConfig())
    for reservation in store.open_requests_of("batch 2").values():
        asyncio.run(later.settle(reservation, 0.0, "expired"))
    assert later.spent == pytest.approx(1.0)


def test_caps_cannot_be_negative():
    with pytest.raises(ValueError, match="^max_usd must be >= 0 or null"):
        BudgetConfig(max_usd=-1.0)
