"""The smoke recipes on the real TL;DR and HH files, through `accelerate launch`, as a user runs them."""

from __future__ import annotations

import gzip
import json
import math
from functools import partial
from pathlib import Path

import pytest
from real_data import DATA
from tiny_runs import ddp, finished, plain

from drpo.run.metrics import read_metrics

FILES = {"tldr": DATA / "tldr" / "axis.jsonl", "hh": DATA / "hh" / "harmless-base.jsonl.gz"}
PROMPT_END = {"tldr": "\n\nTL;DR:", "hh": "\n\nAssistant:"}

FEW_STEPS = ["num_steps=2", "optim.warmup_steps=0", "engine.trackers=[]"]
OFFLINE = [*FEW_STEPS, "batch.size=4", "batch.microbatch_size=2", "eval.every=2", "eval.num_examples=4"]
ONLINE = [*FEW_STEPS, "log.samples_every=1", "rollout.batch_size=8", "eval.every=2", "eval.num_prompts=4"]


def needs(task: str, *further, slow: bool = False):
    """A parameter set that is skipped where the real file is not there."""
    reason = f"no real data at {FILES[task]} (set DRPO_DATA)"
    marks = [pytest.mark.skipif(not FILES[task].is_file(), reason=reason), *[pytest.mark.slow] * slow]
    return pytest.param(task, *further, marks=marks)


def start(launcher, task: str, stage: str, folder: Path, *overrides: str, timeout: float = 300) -> Path:
    """Run the smoke recipe of a stage in `folder`: its run folder, as its last line names it."""
    command = [
        *launcher(stage),
        f"{task}/smoke_{stage}.yaml",
        f"data.path={FILES[task].resolve()}",
        "data.subset=null",
        "data.train_split=train",
        *overrides,
    ]
    done = finished(command, cwd=folder, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    assert done.stderr == ""  # no library has anything to add
    result = Path(done.stdout.splitlines()[-1])
    assert result == folder / "runs" / task / f"smoke_{stage}" / result.name
    assert (result / "config.json").is_file() and (result / "README.md").is_file()
    return result.parent


@pytest.mark.parametrize(
    "task, launcher", [needs("tldr", plain), needs("tldr", ddp, slow=True), needs("hh", plain, slow=True)]
)
def test_the_whole_chain_runs_in_a_few_steps(task, launcher, tmp_path):
    start(launcher, task, "sft", tmp_path, *OFFLINE, "sample.num_prompts=2", "sample.max_response_length=4")
    start(launcher, task, "reward_model", tmp_path, *OFFLINE, "score.num_references=4")
    drpo = start(launcher, task, "drpo", tmp_path, *ONLINE)
    metrics = read_metrics(drpo / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert len(metrics) == 3 and all(math.isfinite(value) for row in metrics for value in row.values())
    assert all(row["ppo/num_optimizer_steps"] == 4 for row in metrics[1:])
    rollouts, evaluations = completions(drpo)
    assert len(rollouts) == 2 * 4 and len(evaluations) == 2 * 4
    assert all(row["prompt"].endswith(PROMPT_END[task]) for row in rollouts + evaluations)
    assert not {row["prompt"] for row in rollouts} & {row["prompt"] for row in evaluations}
    assert any(row["prefix"] for row in rollouts) and not any(row["prefix"] for row in evaluations)
    for row in rollouts:  # a cut character at the end of a prefix decodes to the replacement character
        assert reset_target(task, row["origin"]).startswith(row["prefix"].rstrip("\ufffd"))


def completions(run_dir: Path) -> tuple[list[dict], list[dict]]:
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "rollout"], [row for row in rows if row["split"] == "eval"]


def reset_target(task: str, origin: str) -> str:
    """The response that rollouts on the row at `origin` (file:line) may start from, read from the file itself."""
    opened = gzip.open if FILES[task].suffix == ".gz" else open
    with opened(FILES[task], "rt", encoding="utf-8", newline="\n") as file:
        row = json.loads(file.readlines()[int(origin.rpartition(":")[2]) - 1])
    if task == "hh":
        return row["chosen"].rpartition("\n\nAssistant:")[2]
    best = row["summaries"][row["overall"].index(max(row["overall"]))]
    return best if best[0].isspace() else " " + best


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", [needs("tldr"), needs("hh")])
def test_the_reward_model_score_rises_over_training(task, tmp_path):
    """The recipes as they are; docs/experiments.md has the numbers of several seeds."""
    stage = partial(start, ddp, task, folder=tmp_path, timeout=1800)
    stage(stage="sft")
    reward_model = stage(stage="reward_model")
    accuracy = read_metrics(reward_model / "metrics.jsonl")[-1]["eval/accuracy"]
    assert accuracy > 0.5
    for algorithm in ("drpo", "ppo"):
        metrics = read_metrics(stage(stage=algorithm) / "metrics.jsonl")
        scores = [row["objective/score"] for row in metrics[1:]]
        quarter = len(scores) // 4
        first, last = (sum(part) / quarter for part in (scores[:quarter], scores[-quarter:]))
        assert last > first + 0.2, (algorithm, first, last)
        assert metrics[-1]["eval/score"] > metrics[0]["eval/score"] + 0.2, algorithm
