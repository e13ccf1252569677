"""Collect the verdicts of a judge, with progress and graceful shutdown."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo.run.signals import handles_signals
from eval.judging.judge import Judge, JudgeStopped, Outcome
from eval.judging.matchup import Question
from eval.judging.verdict import Verdict
from eval.progress import Progress, Say

if TYPE_CHECKING:
    from eval.judging.judge_systems import JudgeRecipe


async def collect_verdicts(judge: Judge, questions: Sequence[Question], say: Say) -> Outcome:
    """Collect all verdicts, stopping the judge gracefully on signals.

    Within `graceful_shutdown` the first SIGINT or SIGTERM stops the judge, a second one ends the process.
    """
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM) if handles_signals() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}

    def stop(number: signal.Signals) -> None:
        for handled in handlers:
            loop.remove_signal_handler(handled)
            signal.signal(handled, signal.SIG_DFL)
        say(f"{number.name}: waiting for what is under way; once more ends at once")
        judge.stop(f"{number.name}: stopped; what was under way is kept")

    for number in handlers:
        loop.add_signal_handler(number, stop, number)
    verdicts: list[Verdict] = []
    progress = Progress(len(questions), 0, "verdicts", say)
    try:
        async for verdict in judge.verdicts(questions):
            verdicts.append(verdict)
            progress.advance(1)
    except JudgeStopped as stopped:
        return Outcome(verdicts, stopped)
    finally:
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    return Outcome(verdicts)


def asked_by(make: Callable[[Any, Path], Judge]) -> Callable[[JudgeRecipe, Sequence[Question], Say], Outcome]:
    """Return the `ask` of a kind whose judge is made by `make(settings, run_dir)` and needs nothing else."""

    def ask(recipe: JudgeRecipe, questions: Sequence[Question], say: Say) -> Outcome:
        judge = make(recipe.judge, Path(recipe.run_dir))
        return asyncio.run(collect_verdicts(judge, questions, say))

    return ask
