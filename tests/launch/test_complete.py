"""launch/complete.py: whole runs in this process, killed ones and shared ones as real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from online_runs import DEMO, forget_precision
from tiny_models import tiny_model
from tiny_runs import ddp, plain, started, write_recipe
from tiny_runs import run as run_process
from transformers import AutoTokenizer

from drpo.config import ConfigError, load_recipe
from drpo.data.records import DataError
from drpo.data.tasks.demo import DemoConfig, make_demo
from eval.completions.complete import complete as run
from eval.completions.recipe import CompleteRecipe
from eval.completions.rows import NULL_RESPONSE, read_completions, read_meta

RECIPE = {
    "system": "sft",
    "mixed_precision": "no",
    "data": {"task": "demo", "demo": DEMO},
    "split": "train",
    "num_responses": 3,
    "sampling": {"temperature": 1.0},
    "max_response_length": 8,
    "batch_size": 16,
}
NUM_ROWS = 3 * DEMO["num_train"]


def recipe_file(policy: Path | None, run_dir: Path, **changes) -> Path:
    recipe = {**RECIPE, "run_dir": str(run_dir), **changes}
    if policy is not None:
        recipe["policy"] = str(policy)
    return write_recipe(run_dir.with_suffix(".yaml"), recipe)


def complete(policy: Path | None, run_dir: Path, **changes) -> Path:
    forget_precision()
    result = run(load_recipe(CompleteRecipe, recipe_file(policy, run_dir, **changes), []))
    forget_precision()
    return result


@pytest.fixture(scope="module")
def whole(policy_folder, tmp_path_factory) -> Path:
    """The file of a run that nothing stopped, with both extra systems and perplexity."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return complete(
        policy_folder,
        folder,
        reference=True,
        null_response=True,
        perplexity_policy=str(policy_folder),
    )


def systems_of(path: Path) -> dict[str, list]:
    rows = read_completions(path)
    return {system: [row for row in rows if row.system == system] for system in ("sft", "reference", "null")}


def test_what_a_run_leaves(whole):
    assert {path.name for path in whole.parent.iterdir()} == {
        "completions.jsonl",
        "completions.meta.json",
        "text_metrics.json",
        "config.yaml",
    }
    posts = make_demo(DemoConfig(**DEMO), "prompts", "train")
    systems = systems_of(whole)
    asked = [(row.prompt, row.seed, row.reference) for row in systems["sft"]]
    assert asked == [(post.prompt, seed, post.completion) for post in posts for seed in (0, 1, 2)]
    said = [(row.prompt, row.response, row.ended, row.seed) for row in systems["reference"]]
    assert said == [(post.prompt, post.completion, True, 0) for post in posts]
    assert {row.response for row in systems["null"]} == {NULL_RESPONSE}
    assert len(systems["null"]) == len(posts)
    assert all(row.num_tokens > 1 for row in systems["reference"] + systems["null"])
    meta = read_meta(whole)
    assert all(len(meta[f"{what}_sha256"]) == 64 for what in ("weights", "data", "settings"))
    assert (meta["settings.sampling.temperature"], meta["settings.data.demo.num_train"]) == (1.0, 24)
    assert {"version.torch", "version.transformers", "version.drpo"} <= meta.keys()


def test_the_metrics_are_of_each_system(whole):
    metrics = {each["system"]: each for each in json.loads((whole.parent / "text_metrics.json").read_text())}
    assert list(metrics) == ["sft", "reference", "null"]
    rows = systems_of(whole)["sft"]
    mean = sum(row.num_tokens for row in rows) / NUM_ROWS  # as many responses to every prompt
    assert metrics["sft"]["num_tokens"]["value"] == pytest.approx(mean)
    assert metrics["reference"]["rougeL"] is None
    assert metrics["null"]["rouge1"]["value"] == 0
    assert 1 < metrics["sft"]["perplexity"]["value"] < metrics["null"]["perplexity"]["value"]


def test_a_second_run_asks_nothing_and_other_settings_are_refused(whole, policy_folder, capsys):
    before = whole.read_bytes()
    complete(policy_folder, whole.parent, batch_size=5, perplexity_policy=str(policy_folder))
    assert whole.read_bytes() == before
    assert f"{NUM_ROWS} of {NUM_ROWS} responses are there" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"made in another way.*settings.sampling.temperature: 1.0 -> 0.9"):
        complete(policy_folder, whole.parent, sampling={"temperature": 0.9})
    with pytest.raises(DataError, match="settings.max_response_length: 8 -> 7"):
        complete(policy_folder, whole.parent, max_response_length=7)
    assert whole.read_bytes() == before


def test_a_killed_run_goes_on_where_it_was(whole, policy_folder, tmp_path):
    """SIGKILL in the middle, half a line behind it, then the rest in other batches: the file of one whole run."""
    run_dir = tmp_path / "killed"
    path = run_dir / "completions.jsonl"
    process = started(plain("complete"), str(recipe_file(policy_folder, run_dir, batch_size=1)), cwd=tmp_path)
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    expected = [line for line in whole.read_bytes().splitlines(keepends=True) if b'"system": "sft"' in line]
    there = path.read_bytes().splitlines(keepends=True)
    num_there = sum(line.endswith(b"\n") for line in there)
    assert 5 <= num_there < NUM_ROWS
    assert there[:num_there] == expected[:num_there]
    with path.open("ab") as file:
        file.write(expected[num_there][:40])

    complete(policy_folder, run_dir, batch_size=7)
    assert path.read_bytes().splitlines(keepends=True) == expected


def test_two_processes_write_the_file_of_one(whole, policy_folder, tmp_path):
    extra = {"reference": True, "null_response": True, "perplexity_policy": str(policy_folder)}
    recipe = recipe_file(policy_folder, tmp_path / "shared", batch_size=5, **extra)
    out = run_process(ddp("complete"), str(recipe), cwd=tmp_path)
    path = tmp_path / "shared" / "completions.jsonl"
    assert out.rstrip().splitlines()[-1] == str(path)
    assert path.read_bytes() == whole.read_bytes()
    assert read_meta(path) == read_meta(whole)
    ours, theirs = (json.loads((p.parent / "text_metrics.json").read_text()) for p in (path, whole))
    assert [m.pop("perplexity")["value"] for m in ours] == pytest.approx(
        [m.pop("perplexity")["value"] for m in theirs], rel=1e-4
    )
    assert ours == theirs


def test_own_prompts_need_no_responses(policy_folder, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"q": f"POST: {i}\nTL;DR:"}) + "\n" for i in "abc")
    )
    data = {
        "task": "own",
        "path": str(tmp_path / "own.jsonl"),
        "columns": {"prompt": "q"},
        "eval_fraction": 0.0,
    }
    own = {"data": data, "num_responses": 1, "sampling": {"temperature": 0.0}, "num_prompts": 2}
    rows = read_completions(complete(policy_folder, tmp_path / "run", **own))
    assert len(rows) == 2 and {row.reference for row in rows} == {None}
    with pytest.raises(
        ConfigError, match="reference=true needs the dataset's own responses, and 2 of 2 prompts have none"
    ):
        complete(policy_folder, tmp_path / "more", **own, reference=True)
    with pytest.raises(ConfigError, match="split=eval has no prompts"):
        complete(policy_folder, tmp_path / "more", **own | {"split": "eval"})


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2"])
def test_longer_texts_than_the_policy_has_positions_for(model_type, policy_folder, tmp_path, capsys):
    """A table of positions is refused before anything is sampled; rotary positions go on, after a line that says so."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    tokenizer.save_pretrained(tmp_path / "policy")
    length = {"n_positions": 16} if model_type == "gpt2" else {"max_position_embeddings": 16}
    tiny_model(model_type, vocab_size=len(tokenizer), **length).save_pretrained(tmp_path / "policy")
    said = (
        f"policy: 6 of 6 texts are longer than the 16 positions of this {model_type} model, the longest has "
    )
    remedy = " tokens; set data.max_prompt_length, or lower max_response_length=8"
    few = {"num_prompts": 2}
    if model_type == "gpt2":
        with pytest.raises(ConfigError, match=f"{said}\\d+{remedy}"):
            complete(tmp_path / "policy", tmp_path / "run", **few)
        return
    assert len(read_completions(complete(tmp_path / "policy", tmp_path / "run", **few))) == 6
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "positions" in line)
    assert line.startswith(f"warning: {said}") and line.endswith(remedy)


def test_a_file_made_elsewhere_joins_the_same_way(tmp_path):
    rows = [{"q": p, "gold": f" {p}!", "a": f" {p}?", "cost": 1} for p in ("one two", "three four")]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"prompt": "q", "response": "a", "reference": "gold"}
    imported = {"path": str(tmp_path / "made.jsonl"), "columns": columns}
    recipe = {"system": "gpt", "run_dir": str(tmp_path / "run"), "imported": imported, "reference": True}
    file = write_recipe(tmp_path / "import.yaml", recipe)
    for _ in range(2):  # the second time there is nothing to add
        forget_precision()
        path = run(load_recipe(CompleteRecipe, file, []))
        found = read_completions(path)
        assert [(row.system, row.response) for row in found] == [
            ("gpt", " one two?"),
            ("gpt", " three four?"),
            ("reference", " one two!"),
            ("reference", " three four!"),
        ]
    metrics = json.loads((tmp_path / "run" / "text_metrics.json").read_text())
    assert metrics[0]["rougeL"]["value"] == 1.0
    (tmp_path / "made.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match=r"made in another way \(imported.sha256"):
        run(load_recipe(CompleteRecipe, file, []))


def test_the_samples_of_a_training_run_are_not_overwritten(policy_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "completions.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="without completions.meta.json: a file from elsewhere"):
        complete(policy_folder, tmp_path / "run")
    assert (tmp_path / "run" / "completions.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_responses": 2, "sampling": {"temperature": 0.0}},
            "num_responses must be 1 for sampling.temperature=0",
        ),
        ({"system": "reference"}, "system must not be the name of a built-in system, got reference"),
        ({"imported": {"path": "x.jsonl"}}, "data does not apply to imported.path=x.jsonl"),
        ({"imported": {"columns": {"prompt": "q"}}}, "imported needs imported.path"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"num_prompts": 0}, "num_prompts must be >= 1 or null, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"seed": 2**63 - 1}, "seed must be below .*, got 9223372036854775807"),
    ],
)
def test_what_does_not_apply_is_refused(policy_folder, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(CompleteRecipe, recipe_file(None, tmp_path / "run", **changes), [])


def test_policy_and_system_must_be_named(policy_folder, tmp_path):
    for policy, system in ((None, "sft"), (policy_folder, None)):
        with pytest.raises(ConfigError, match="policy must name a policy"):
            complete(policy, tmp_path / "run", system=system)
    with pytest.raises(ConfigError, match=r"^bad_tokens: \['</never>'\] are not single tokens"):
        complete(policy_folder, tmp_path / "run", bad_tokens=["</never>"])
