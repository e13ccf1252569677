"""launch/dpo.py as users run it: a real process, the folder it leaves, and mistakes named in one message."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from online_runs import forget_precision
from tiny_runs import PREFERENCE, finished, metrics_of, plain, run, write_recipe
from transformers import AutoModelForCausalLM

from drpo.api import train_preference
from drpo.trainers.preference.recipe import PreferenceRecipe
from launch.command_line import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy_folder) -> Path:
    """A user's folder: a recipe and data of their own, without scores, labels or ranks."""
    folder = tmp_path_factory.mktemp("launch_dpo")
    rows = [{"prompt": f"q{i}", "chosen": f" g{i}\n x", "rejected": f" b{i}"} for i in range(20)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "own", "path": "own.jsonl", "eval_fraction": 0.2}
    given = {"run_dir": "run", "model": {"path": str(policy_folder)}}
    write_recipe(folder / "dpo.yaml", {**PREFERENCE, **given, "data": data, "num_steps": 2})
    write_recipe(folder / "demo.yaml", {**PREFERENCE, **given})
    return folder


def test_a_run_leaves_a_policy_and_prints_its_path_last(folder):
    rewards = "sample.reward_functions={true_reward: 'drpo.data.tasks.demo:true_rewards'}"
    out = run(plain("dpo"), "demo.yaml", "run_dir=made", "num_steps=2", "loss.dr_dpo={}", rewards, cwd=folder)
    assert out.rstrip("\n").splitlines()[-1] == str(folder / "made" / "policy")
    AutoModelForCausalLM.from_pretrained(folder / "made" / "policy")
    rows = metrics_of(folder / "made")
    assert [row["step"] for row in rows] == [1, 2]
    assert {"train/weight", "eval/accuracy", "eval/true_reward", "eval/kl"} <= rows[-1].keys()
    card = (folder / "made" / "policy" / "README.md").read_text()
    assert "beta_prime: 1.0" in card and "| eval/accuracy |" in card


def test_an_error_is_one_message_on_standard_error(folder):
    done = finished(plain("dpo"), "dpo.yaml", "run_dir=failed", "loss.offset={}", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("dpo.py: 1"), done.stderr  # 16 or so of as many pairs are bad
    assert "loss.offset needs chosen_score" in done.stderr and "own.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "failed").exists()


@pytest.fixture
def fails(folder, monkeypatch) -> Iterator[Callable[..., str]]:
    """`fails("recipe.yaml", "key=value", ...)` is the one message with which the script leaves."""
    monkeypatch.chdir(folder)
    forget_precision()

    def start(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dpo.py", *arguments])
        with pytest.raises(SystemExit) as left:
            main(PreferenceRecipe, "demo/dpo.yaml", train_preference)
        assert isinstance(left.value.code, str) and left.value.code.startswith("dpo.py: ")
        assert not (folder / "run").exists()
        return left.value.code

    yield start
    forget_precision()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["loss.nmae=dpo"], ["loss.nmae", "known keys there", "loss.name"]),
        (["loss.name=ddpo"], ["loss.name", "ddpo"]),
        (["loss.label_smoothing=0.1"], ["loss.label_smoothing is for loss.name=cdpo|robust, not for dpo"]),
        (["loss.offset.scale=sqrt"], ["loss.offset.scale", "sqrt"]),
        (["loss=dpo"], ["loss is a section"]),
        (["curriculum.num_stages=0"], ["curriculum.num_stages must be >= 1, got 0"]),
        (["curriculum={}"], ["no ranked rows: they need responses"]),
        (["loss.offset={}"], ["loss.offset needs chosen_score", "columns chosen_score and rejected_score"]),
        (["loss.token_weights={}"], ["loss.token_weights needs chosen_relevance"]),
        (["reference.path=./none"], ["reference.path: ", "./none"]),
        (["sample.reward_functions={good: 'nowhere:score'}"], ["sample.reward_functions", "nowhere"]),
        (["loss.name=kto", "data.noise.flip_rate=0.2"], ["noise applies to preference pairs"]),
        (["batch.size=0"], ["batch.size must be >= 1"]),
        (["data.eval_fraction=0"], ["no held-out examples", "eval.every=0"]),
        (["optim.warmup_steps=2"], ["optim.warmup_steps is 2, it must be below the number of steps, 2"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_mistakes_in_a_recipe_are_named(fails, arguments, named):
    message = fails("dpo.yaml", *arguments)
    for part in named:
        assert part in message
