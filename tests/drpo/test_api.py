"""The front door in Python: objects in place of paths, two runs in one process, and nothing taken over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from datasets import Dataset
from tiny_runs import CLEAN, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import drpo
from drpo.config import ConfigError, load_recipe
from drpo.data.records import DataError
from drpo.data.tasks.demo import true_rewards
from drpo.run.metrics import read_metrics, reproducible
from drpo.trainers.online_recipe import OnlineRecipe

ROWS = [{"prompt": f"Say {i}:", "chosen": f" {i}.", "rejected": " no."} for i in range(24)]
RECIPE = {
    "num_steps": 2,
    "data": {"eval_fraction": 0.2, "task": "own", "path": "rows.jsonl"},
    "reset": {"source": "chosen"},
    "rollout": {"batch_size": 8, "max_response_length": 6},
    "ppo": {"num_epochs": 1, "microbatch_size": 4},
    "eval": {"every": 1, "num_prompts": 2},
    "log": {"samples_every": 0},
    "engine": {"trackers": [], "mixed_precision": "no"},
}


def by_length(completions) -> list[float]:
    return [float(len(c.response)) for c in completions]


def recipe(folder, tmp_path, **changes) -> OnlineRecipe:
    """RECIPE without data, model or reward; `changes` are overrides."""
    path = tmp_path / "recipe.json"
    plain = {**RECIPE, "run_dir": str(folder), "data": {}}
    path.write_text(json.dumps(plain))
    return load_recipe(OnlineRecipe, path, [f"{key}={value}" for key, value in changes.items()])


@pytest.fixture
def objects(policy_folder):
    return {
        "model": AutoModelForCausalLM.from_pretrained(policy_folder),
        "tokenizer": AutoTokenizer.from_pretrained(policy_folder),
    }


def metrics_of(folder) -> list[dict]:
    return [reproducible(row) for row in read_metrics(folder / "metrics.jsonl")]


def test_objects_train_as_their_files_do(objects, policy_folder, tmp_path):
    before = {name: weight.clone() for name, weight in objects["model"].state_dict().items()}
    result = drpo.train_online(
        recipe(tmp_path / "objects", tmp_path), records=ROWS, reward=by_length, **objects
    )
    assert result == tmp_path / "objects" / "policy" and (result / "model.safetensors").is_file()
    assert all(weight.equal(before[name]) for name, weight in objects["model"].state_dict().items())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drpo.train_online(
        recipe(tmp_path / "files", tmp_path),
        model=policy_folder,
        records=tmp_path / "rows.jsonl",
        reward=by_length,
    )
    assert metrics_of(tmp_path / "objects") == metrics_of(tmp_path / "files")
    drpo.train_online(
        recipe(tmp_path / "dataset", tmp_path), records=Dataset.from_list(ROWS), reward=by_length, **objects
    )
    assert metrics_of(tmp_path / "dataset") == metrics_of(tmp_path / "files")


def test_a_run_of_objects_resumes_and_refuses_others(objects, tmp_path):
    steps: list[int] = []
    call = {"records": ROWS, "reward": by_length, "callbacks": [lambda step, metrics: steps.append(step)]}
    drpo.train_online(
        recipe(tmp_path / "run", tmp_path, num_steps=1, **{"checkpoint.every": 1}), **call, **objects
    )
    drpo.train_online(
        recipe(tmp_path / "run", tmp_path, num_steps=1, **{"checkpoint.every": 1}), **call, **objects
    )
    assert steps == [0, 1]  # the second call had nothing left to do
    call["records"] = [*ROWS, {"prompt": "more", "chosen": " x", "rejected": " y"}]
    with pytest.raises(ConfigError, match="run_inputs/records holds other inputs.*another run_dir"):
        drpo.train_online(
            recipe(tmp_path / "run", tmp_path, num_steps=1, **{"checkpoint.every": 1}), **call, **objects
        )


def test_two_runs_in_one_process_have_their_own_precision(objects, tmp_path):
    for precision in ("no", "bf16", "no"):
        folder = tmp_path / precision
        changes = {"engine.mixed_precision": precision, "num_steps": 1, "resume": "restart", "eval.every": 0}
        drpo.train_online(recipe(folder, tmp_path, **changes), records=ROWS, reward=by_length, **objects)
        assert (
            f"mixed_precision: {precision!r}".replace("'bf16'", "bf16")
            in (folder / "config.yaml").read_text()
        )


def test_signals_are_left_alone(objects, tmp_path):
    seen = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def look(step, metrics) -> None:
        seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    drpo.train_online(
        recipe(tmp_path / "run", tmp_path, num_steps=1),
        records=ROWS,
        reward=by_length,
        callbacks=[look],
        **objects,
    )
    assert seen and all(handlers == before for handlers in seen)


def test_other_stages_take_objects_too(objects, tmp_path):
    data = {
        "eval": {"every": 0},
        "engine": RECIPE["engine"],
        "num_steps": 1,
        "batch": {"size": 4, "microbatch_size": 4},
    }
    rows = [{**row, "completion": row["chosen"]} for row in ROWS]
    stages = {
        "sft": (drpo.train_sft, drpo.SFTRecipe, "policy"),
        "dpo": (drpo.train_preference, drpo.PreferenceRecipe, "policy"),
        "rm": (drpo.train_reward_model, drpo.RewardModelRecipe, "reward_model"),
    }
    for name, (train, recipe_class, result) in stages.items():
        made = recipe_class(run_dir=str(tmp_path / name), **data)
        assert train(made, records=rows, **objects) == tmp_path / name / result
    reward = drpo.OnlineRecipe(
        run_dir=str(tmp_path / "online"),
        **{key: value for key, value in RECIPE.items() if key != "data"},
        reward={"path": str(tmp_path / "rm" / "reward_model")},
    )
    assert drpo.train_online(reward, records=ROWS, **objects).is_dir()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokenizer": None}, ConfigError, "needs its tokenizer"),
        ({"records": "rows.jsonl", "model": "m"}, ConfigError, "a path brings its own"),
        ({"records": [["a"]]}, DataError, r"records\[0\] is list, not a mapping"),
        (
            {"records": [{"prompt": "a"}, {"prompt": {1, 2}}]},
            DataError,
            r"records\[1\] cannot be written as JSON",
        ),
        ({"records": [{"prompt": "a", "score": float("nan")}]}, DataError, r"records\[0\] cannot be written"),
    ],
)
def test_unusable_arguments_are_refused(objects, tmp_path, arguments, error, message):
    given = {"records": ROWS, "reward": by_length, **objects, **arguments}
    with pytest.raises(error, match=message):
        drpo.train_online(recipe(tmp_path / "run", tmp_path), **given)
    assert not list(tmp_path.glob("run_inputs/records*"))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"model.path": "elsewhere"}, {}, "model.path or model.architecture too"),
        (
            {"data.task": "own", "data.path": "x.jsonl"},
            {"model": None, "tokenizer": None},
            "data.path=x.jsonl too",
        ),
        ({"model.tokenizer": "elsewhere"}, {"model": None}, "model.tokenizer too"),
        ({"reward.path": "elsewhere"}, {}, "reward.path too"),
    ],
)
def test_what_the_recipe_names_is_not_given_again(objects, tmp_path, changes, arguments, message):
    given = {"records": ROWS, "reward": true_rewards, **objects, **arguments}
    with pytest.raises(ConfigError, match=message):
        drpo.train_online(recipe(tmp_path / "run", tmp_path, **changes), **given)


def test_the_table_of_contents_is_true_and_cheap():
    assert {name for name in drpo.__all__ if getattr(drpo, name) is None} == set()
    assert set(drpo.__all__) <= set(dir(drpo))
    with pytest.raises(AttributeError, match="drpo has no trane; it has train_online"):
        drpo.trane  # noqa: B018
    code = "import sys, drpo, eval; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CLEAN, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
