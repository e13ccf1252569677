"""The budget: hard caps on dollars and requests, also for concurrent calls.

Before a request is sent, its maximum cost is reserved and entered in the store; afterwards the reservation is replaced
by the actual cost. Requests of earlier runs on the same store count, and so do those in flight when a run was killed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from drpo.config import Section, setting
from eval.judging.openai.prices import PRICES
from eval.judging.openai.store import Call, Reservation, Store


@dataclass(frozen=True)
class BudgetConfig(Section):
    """What the judge's calls may cost (section `budget`)."""

    max_usd: float | None = setting(None, ge=0)
    """The most dollars that the calls of this store may ever cost, earlier runs included; null for no cap. Needs a
    price for the model."""
    max_calls: int | None = setting(None, ge=0)
    """The most requests that this store may ever send, retries and earlier runs included; null for no cap."""
    prices: str | None = None
    """A YAML table of prices in place of eval/judging/openai/prices.yaml."""
    dry_run: bool = False
    """Stop after the estimate: nothing is asked."""

    @property
    def prices_path(self) -> str:
        return self.prices or str(PRICES)


class BudgetReached(Exception):
    """The next request could pass a cap, so it was not sent."""


class Budget:
    """The caps of one store, with the amounts spent and reserved."""

    def __init__(self, store: Store, config: BudgetConfig) -> None:
        self._store, self._config = store, config
        ledger = store.ledger()
        self.spent, self.num_requests = ledger.usd, ledger.num_requests
        self._reserved: dict[int, float] = {}
        self._settled = asyncio.Condition()

    @property
    def reserved(self) -> float:
        """Dollars reserved for requests in flight."""
        return sum(self._reserved.values())

    async def reserve(self, key: str, usd: float) -> Reservation:
        """Wait until one request that costs at most `usd` may be sent, and reserve its cost.

        Waits while requests in flight hold the required amount, as they may cost less than they reserved.
        Raises BudgetReached at once when max_calls is used up, and when max_usd is exceeded with none in flight.
        """
        async with self._settled:
            while (refusal := self._refusal(usd, 1)) is not None:
                if not self._reserved or self._calls_used_up(1):
                    raise BudgetReached(refusal)
                await self._settled.wait()
            return self._enter([(key, usd)])[0]

    def reserve_batch(self, max_usd: list[tuple[str, float]], batch: str) -> None:
        """Reserve a whole batch, as key and maximum cost, or raise BudgetReached and reserve nothing."""
        refusal = self._refusal(sum(usd for _, usd in max_usd), len(max_usd))
        if refusal is not None:
            raise BudgetReached(refusal)
        self._enter(max_usd, batch)

    def _enter(self, max_usd: list[tuple[str, float]], batch: str | None = None) -> list[Reservation]:
        reservations = self._store.open_requests(max_usd, batch)
        self._reserved |= {reservation.number: reservation.usd for reservation in reservations}
        self.num_requests += len(reservations)
        return reservations

    async def settle(
        self, reservation: Reservation, usd: float | None, outcome: str, call: Call | None = None
    ) -> None:
        """Replace a reservation, of this run or an earlier one, by the cost of its request, and keep the answer.

        An unknown cost, None, counts as the maximum cost.
        """
        paid = reservation.usd if usd is None else usd
        self._store.settle(reservation, paid, outcome, call)
        if self._reserved.pop(reservation.number, None) is None:  # an earlier run's, which `spent` contains
            self.spent -= reservation.usd
        self.spent += paid
        async with self._settled:
            self._settled.notify_all()

    async def withdraw(self, reservation: Reservation) -> None:
        """Cancel a reservation whose request was never sent."""
        self._store.forget_request(reservation)
        del self._reserved[reservation.number]
        self.num_requests -= 1
        async with self._settled:
            self._settled.notify_all()

    def _calls_used_up(self, count: int) -> bool:
        cap = self._config.max_calls
        return cap is not None and self.num_requests + count > cap

    def _refusal(self, usd: float, count: int) -> str | None:
        """Return why `count` more requests of at most `usd` dollars may not be sent, None if they may."""
        subject = "the next request" if count == 1 else f"the next {count} requests"
        if self._calls_used_up(count):
            return (
                f"{subject} would pass budget.max_calls={self._config.max_calls}: {self.num_requests} were sent; "
                "raise it to go on"
            )
        cap = self._config.max_usd
        if cap is not None and self.spent + self.reserved + usd > cap:
            return (
                f"{subject} could cost ${usd:.4f}, which would pass budget.max_usd={cap:g}: ${self.spent:.4f} are spent"
                + (f" and ${self.reserved:.4f} reserved" if self._reserved else "")
                + "; raise it to go on"
            )
        return None
