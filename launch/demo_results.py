"""Show the results of the demo's runs: reward-model accuracy by kind of error, curves of PPO and DR-PO."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from drpo.data.encode import encode_query, encode_response
from drpo.data.tasks.demo import DemoConfig
from drpo.data.tasks.demo_errors import ERROR_KINDS, make_faulty_summaries
from drpo.engine import Engine, EngineConfig
from drpo.models.tokenizer import load_tokenizer
from drpo.rewards import Completion
from drpo.run.metrics import read_metrics
from launch.demo_inputs import DEMO_RUNS
from reward_models.score import RewardModelScorer

CURVES = {"true reward": "eval/true_reward", "reward-model score": "eval/score"}


def evaluations(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's metrics that hold an evaluation, first to last."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "eval/score" in row]


def error_table(reward_model: Path) -> Table:
    """Tabulate, by kind of error, how often the reward model prefers a reference to a copy with that error."""
    engine = Engine(EngineConfig(trackers=[]), DEMO_RUNS, seed=0, max_grad_norm=None)
    scorer = RewardModelScorer.load(str(reward_model), engine, 128, "float32", str(reward_model))
    tokenizer = load_tokenizer(reward_model)
    summaries = make_faulty_summaries(DemoConfig())

    def scores(texts: list[str], ended: list[bool]):
        completions = []
        for summary, text, end in zip(summaries, texts, ended, strict=True):
            query = encode_query(tokenizer, summary.record.prompt)
            response = encode_response(tokenizer, text)
            response = response if end else response[:-1]
            completions.append(Completion(summary.record.prompt, text, end, query, response, summary.record))
        return scorer(completions)

    references = scores([s.record.completion for s in summaries], [True] * len(summaries))
    faulty = scores([s.response for s in summaries], [s.ended for s in summaries])
    table = Table("kind of error", title="reward model: a held-out reference against itself with one fault")
    for name in ("accuracy", "mean score of reference", "mean score of faulty"):
        table.add_column(name, justify="right")
    for kind in ERROR_KINDS:
        indices = [index for index, summary in enumerate(summaries) if summary.kind == kind]
        reference, copy = references[indices], faulty[indices]
        wins = (reference > copy).float().mean()
        table.add_row(kind, f"{wins:.3f}", f"{reference.mean():.2f}", f"{copy.mean():.2f}")
    return table


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot true reward and reward-model score on held-out prompts over training."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.subplots(1, 2, sharex=True)
    for axis, (name, key) in zip(axes, CURVES.items(), strict=True):
        for policy, rows in runs.items():
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], marker="o", label=policy)
        axis.set_xlabel("step")
        axis.set_title(f"{name}, held-out prompts")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
