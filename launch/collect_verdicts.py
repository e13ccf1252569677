"""All verdicts of a judge, with signs of life and an orderly stop."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

from eval.judging.comparison import Question
from eval.judging.judge import Judge, JudgeStopped
from eval.judging.verdict import Verdict

PROGRESS_SECONDS = 15.0


async def collect_verdicts(
    judge: Judge, questions: Sequence[Question]
) -> tuple[list[Verdict], JudgeStopped | None]:
    """All verdicts, and why there are no more if that is so. The first SIGINT or SIGTERM ends the asking in order, a
    second one the process."""
    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: signal.Signals) -> None:
        for each in handlers:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        print(f"{number.name}: waiting for what is under way; once more ends at once", flush=True)
        judge.stop(f"{number.name}: stopped; what was under way is kept")

    for number in handlers:
        loop.add_signal_handler(number, stop, number)
    verdicts: list[Verdict] = []
    shown = time.monotonic()
    try:
        async for verdict in judge.verdicts(questions):
            verdicts.append(verdict)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                print(f"{len(verdicts)} of {len(questions)} verdicts", flush=True)
    except JudgeStopped as stopped:
        return verdicts, stopped
    finally:
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    return verdicts, None
