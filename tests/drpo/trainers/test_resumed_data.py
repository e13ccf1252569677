"""A run that is started again knows whether its training data is still the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from offline_runs import run_preference, run_reward_model, run_sft
from online_runs import run_online

from drpo.data.encode import Example
from drpo.data.load import Splits
from drpo.data.records import Record
from drpo.data.tasks.demo import DemoConfig
from drpo.run.checkpoints import CheckpointError

ROWS = [
    {"prompt": f"Post {i}:", "completion": f" good {i}", "chosen": f" good {i}", "rejected": f" bad {i}"}
    for i in range(24)
]
CHANGES = {
    "one row fewer": lambda rows: rows[:-1],
    "another order": lambda rows: [rows[1], rows[0], *rows[2:]],
    "another response": lambda rows: [{**rows[0], "completion": " best", "chosen": " best"}, *rows[1:]],
}


def write(rows: list[dict], file: Path) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(stage: str, policy: Path, folder: Path) -> None:
    data = {"task": "own", "path": str(folder / "rows.jsonl"), "demo": asdict(DemoConfig())}
    changes = {"data": data, "eval": {"every": 0}}
    if stage == "online":
        online = {"rollout": {"batch_size": 8}, "ppo": {"num_epochs": 1}, "num_steps": 1}
        run_online(
            policy, folder / "run", {**changes, **online}, lambda completions: [0.0] * len(completions)
        )
    elif stage == "preference":
        run_preference(policy, folder / "run", **changes, num_steps=1, sample={"num_prompts": 0})
    elif stage == "sft":
        run_sft(folder / "run", **changes, num_steps=1)
    else:
        run_reward_model(folder / "run", **changes, num_steps=1, score={"num_references": 0})


@pytest.mark.parametrize("stage", ["sft", "reward_model", "preference", "online"])
def test_a_run_is_not_resumed_on_other_data(policy_folder, tmp_path, stage):
    write(ROWS, tmp_path / "rows.jsonl")
    start(stage, policy_folder, tmp_path)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    start(stage, policy_folder, tmp_path)  # as it was: nothing is left to do
    for change in CHANGES.values():
        write(change(ROWS), tmp_path / "rows.jsonl")
        with pytest.raises(CheckpointError, match=r"run on other training data .* resume=restart"):
            start(stage, policy_folder, tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def digest(*examples: Example) -> str:
    return Splits(list(examples), [], "").train_digest()


def test_a_digest_tells_apart_where_tokens_are_and_what_goes_with_them():
    record = Record(prompt="", origin="")
    different = [
        [Example(record, [1, 2])],
        [Example(record, [1]), Example(record, [2])],
        [Example(record, [1], [2])],
        [Example(record, [1], chosen_ids=[2])],
        [Example(record, [1], ranked_ids=[[2]])],
        [Example(record, [1, 2], [])],
    ]
    scored, labelled = Record(prompt="", scores=[1.0, 2.0]), Record(prompt="", extra={"answer": "3"})
    different += [[Example(record, [1, 2])] for record in (scored, labelled)]
    assert len({digest(*examples) for examples in different}) == len(different)
    again = Example(Record(prompt="other", origin="elsewhere"), [1, 2])
    assert digest(again) == digest(*different[0])
