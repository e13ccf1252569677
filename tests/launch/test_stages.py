"""The launch scripts as users run them: real processes, the folder that a run leaves, and errors in one message."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from online_runs import forget_precision, merged
from tiny_runs import (
    CLEAN,
    ONLINE,
    ROOT,
    SFT,
    accelerate,
    ddp,
    deepspeed,
    finished,
    metrics_of,
    plain,
    run,
    write_recipe,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.api import train_online, train_sft
from drpo.config import load_recipe
from drpo.trainers.online_recipe import OnlineRecipe
from drpo.trainers.sft import SFTRecipe
from launch.command_line import find_recipe, main
from launch.demo_inputs import single_process_environment
from reward_models.model import RewardModel

RECIPE_SCRIPTS = sorted(
    script.stem
    for script in (ROOT / "launch").glob("*.py")
    if re.search(r"^from launch.command_line import .*\bmain\b", script.read_text(), re.MULTILINE)
)
KEYS = {
    "sft": ("loss_on", "sample.num_prompts"),
    "reward_model": ("score.aggregation", "references"),
    "evaluate_reward_model": ("models", "best_of_k"),
    "drpo": ("reset.proportion", "rollout.sampling.top_p"),
    "ppo": ("kl.coef", "ppo.num_minibatches"),
    "dpo": ("loss.name", "curriculum"),
    "reset_experiment": ("methods", "num_jobs"),
    "reset_methods": ("methods", "baseline"),
    "preference_experiment": ("tables", "num_jobs"),
    "neuron_shift": ("before", "probe.source"),
    "benchmark": ("baseline", "num_repeats"),
    "trunk_speed": ("baseline", "trainable_layers"),
    "rollout_speed": ("num_batches", "only"),
    "gpu_check": ("allow_cpu", "part_seconds"),
    "smollm_experiment": ("judge_data_path", "num_jobs"),
    "complete": ("policy", "imported.columns"),
    "judge": ("half_tie", "max_undecided"),
    "compare": ("kl_reference", "judging.budget.max_usd"),
    "agreement": ("judgments", "labels"),
    "label": ("baseline", "port"),
    "import_labels": ("split", "data.task"),
}
PAIRS = {k: SFT[k] for k in ("num_steps", "data", "model", "batch", "optim", "eval", "log", "engine")}
MY_REWARDS = """
def score(completions):
    return [float(len(completion.response.split())) for completion in completions]

not_a_function = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: an SFT policy, recipes, a module with a reward function, and data of their own."""
    folder = tmp_path_factory.mktemp("launch")
    write_recipe(folder / "sft.yaml", {**SFT, "run_dir": "sft"})
    write_recipe(folder / "reward_model.yaml", {**PAIRS, "run_dir": "rm", "model": {"path": "sft/policy"}})
    write_recipe(folder / "drpo.yaml", {**ONLINE, "model": {"path": "sft/policy"}})
    own = {"task": "own", "path": "own.jsonl", "max_bad_fraction": 0.0}
    write_recipe(folder / "own.yaml", {**ONLINE, "model": {"path": "sft/policy"}, "data": own})
    (folder / "broken.yaml").write_text("num_steps: [1\n")
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    rows = [{"question": f"q{i}", "good": f" g{i}", "bad": f" b{i}"} for i in range(20)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(plain("sft"), "sft.yaml", cwd=folder)
    return folder


def last_line(output: str) -> str:
    return output.rstrip("\n").splitlines()[-1]


# --- help and the guard ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", RECIPE_SCRIPTS)
def test_help_lists_the_keys_from_any_folder(script, tmp_path):
    """It needs the package drpo, which the script of that name in the same folder must not hide."""
    out = run(plain(script), "--help", cwd=tmp_path)
    assert out.startswith(f"usage: {script}.py [recipe.yaml] [section.key=value ...]")
    for key in ("run_dir", *KEYS[script]):
        assert re.search(rf"^  {re.escape(key)}  \(.*; default ", out, re.MULTILINE), key


@pytest.mark.parametrize("script", sorted((ROOT / "launch").rglob("*.py")), ids=lambda path: path.stem)
def test_a_script_puts_the_project_before_its_own_folder(script):
    """Else launch/drpo.py would hide the package drpo, whatever is imported next."""
    code = script.read_text()
    if "__main__" not in code or script.stem == "cli":
        return
    project = "parent" if script.parent.name == "launch" else "parents[1]"
    first = re.search(r"^from (drpo|reward_models|eval|launch)\b", code, re.MULTILINE)
    before = code if first is None else code[: first.start()]
    assert "if Path(sys.path[0]).resolve() == HERE:" in before, f"{script} does not guard its imports"
    assert f"    sys.path[0] = str(HERE.{project})\n" in before


@pytest.mark.parametrize(
    "arguments, where",
    [((str(ROOT / "launch" / "drpo.py"),), None), (("-m", "launch.drpo"), ROOT)],
    ids=["by its file from elsewhere", "as a module from the repository"],
)
def test_accelerate_launch_imports_the_package_and_not_the_script(arguments, where, tmp_path):
    out = run([*accelerate(), "--cpu", "--num_processes", "1", *arguments], "--help", cwd=where or tmp_path)
    assert "usage: drpo.py" in out and "reset.proportion" in out


WHO = """
from pathlib import Path
from drpo.engine import Engine, EngineConfig

engine = Engine(EngineConfig(trackers=[]), Path("."), seed=0, max_grad_norm=None)
print(f"{engine.world_size} {engine.gather_objects([engine.rank])} {engine.precision}\\n", end="", flush=True)
engine.close()
"""


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(lambda: ddp("sft"), id="cpu", marks=pytest.mark.slow),
        pytest.param(lambda: deepspeed("sft", 2), id="zero2"),
    ],
)
def test_the_configs_of_several_processes_start_several_that_know_each_other(launcher, tmp_path):
    """accelerate takes MULTI_CPU for one process, and two without a word about the CPU for two times one."""
    (tmp_path / "who.py").write_text(WHO)
    command, env = [*launcher()[:-1], "who.py"], CLEAN | {"PYTHONPATH": str(ROOT)}
    done = finished(command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 [0, 1] no") == 2


@pytest.mark.parametrize(
    "command, models",
    [
        ("neuron_shift", ["sft_often/policy", "dpo/policy"]),
        ("compare", ["sft/policy", "ppo/policy", "drpo/policy", "sft/policy", "reward_model/reward_model"]),
    ],
)
def test_an_evaluation_of_the_demo_names_the_models_that_must_be_made(command, models):
    script = importlib.import_module(f"launch.{command}")
    (recipe_class,) = (value for name, value in vars(script).items() if name.endswith("Recipe"))
    recipe = load_recipe(recipe_class, find_recipe(f"demo/{command}.yaml"), [])
    assert script.inputs(recipe) == [f"runs/demo/{model}" for model in models]


def test_a_script_that_is_started_in_its_own_folder_imports_the_package():
    out = run([sys.executable, "drpo.py"], "--help", cwd=ROOT / "launch")
    assert "reset.proportion" in out


# --- what a run leaves ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(folder) -> tuple[Path, str]:
    """The folder and standard output of a DR-PO run that starts from a trained policy and reward model."""
    assert last_line(run(plain("reward_model"), "reward_model.yaml", cwd=folder)) == str(
        folder / "rm" / "reward_model"
    )
    trained = "rm/reward_model"
    changes = ["reward.function=null", f"reward.path={trained}", f"critic.path={trained}"]
    return folder, run(plain("drpo"), "drpo.yaml", "run_dir=first", *changes, cwd=folder)


def test_the_last_line_is_the_path_of_the_result(chain):
    folder, out = chain
    assert last_line(out) == str(folder / "first" / "policy")
    assert sorted(path.name for path in (folder / "first").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "critic",
        "metrics.jsonl",
        "policy",
        "resets.jsonl",
        "samples.jsonl",
    ]


def test_the_config_says_all_that_decided_the_run(chain):
    folder, _ = chain
    text = (folder / "first" / "config.yaml").read_text()
    assert re.search(r"^# git_commit: ([0-9a-f]{40}(\+changes)?|unknown)$", text, re.MULTILINE)
    assert f"# torch: {metadata.version('torch')}\n" in text
    assert f"# transformers: {metadata.version('transformers')}\n" in text
    resolved = yaml.safe_load(text)
    assert resolved["reward"]["path"] == "rm/reward_model"
    assert resolved["advantage"]["lam"] == load_recipe(OnlineRecipe, folder / "drpo.yaml", []).advantage.lam


def test_the_config_given_back_as_a_recipe_gives_the_same_run(chain):
    folder, _ = chain
    run(plain("drpo"), "first/config.yaml", "run_dir=again", cwd=folder)
    assert metrics_of(folder / "again") == metrics_of(folder / "first")
    first, again = (
        yaml.safe_load((folder / name / "config.yaml").read_text()) for name in ("first", "again")
    )
    assert {**first, "run_dir": "again"} == again


def test_metrics_have_a_row_a_step_and_completions_their_step(chain):
    folder, _ = chain
    rows = [json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all("time/step" in row and "perf/episodes_per_second" in row for row in rows[1:])
    assert all(isinstance(value, int | float) for row in rows for value in row.values())
    samples = [json.loads(line) for line in (folder / "first" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 1, 2, 4}  # evaluations and every other step
    assert all({"prompt", "prefix", "continuation", "ended", "scores"} <= row.keys() for row in samples)


def test_checkpoints_are_rotated(chain):
    folder, _ = chain
    assert sorted(path.name for path in (folder / "first" / "checkpoints").iterdir()) == ["step_3", "step_4"]


def test_the_policy_is_a_plain_folder_that_explains_itself(chain):
    folder, _ = chain
    path = folder / "first" / "policy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer("SUBREDDIT: r/camping", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe == yaml.safe_load((folder / "first" / "config.yaml").read_text())
    assert "demo/train: 256 prompts made" in card
    last = metrics_of(folder / "first")[-1]
    assert f"| objective/kl_k3 | {last['objective/kl_k3']:.6g} |" in card


def test_the_reward_model_is_such_a_folder_too_and_scores_every_completion(chain):
    folder, _ = chain
    model = RewardModel.from_pretrained(folder / "rm" / "reward_model")
    assert model.config.centre != 0
    assert "score:\n  aggregation: last" in (folder / "rm" / "reward_model" / "README.md").read_text()
    samples = [json.loads(line) for line in (folder / "first" / "samples.jsonl").read_text().splitlines()]
    scores = [row["scores"]["score"] for row in samples if row["split"] == "eval" and row["step"] == 4]
    assert len(set(scores)) == 8
    assert metrics_of(folder / "first")[-1]["eval/score"] == pytest.approx(sum(scores) / 8)


def test_a_users_reward_function_in_the_working_directory_is_found(folder):
    """Through `accelerate launch -m` from a folder that is not the repository."""
    command = [*accelerate(), "--cpu", "--num_processes", "1", "-m", "launch.drpo"]
    arguments = [
        "drpo.yaml",
        "run_dir=mine",
        "num_steps=1",
        "reward.function=my_rewards:score",
        "eval.every=1",
    ]
    done = finished(command, *arguments, cwd=folder, env={**CLEAN, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert last_line(done.stdout) == str(folder / "mine" / "policy")
    samples = [json.loads(line) for line in (folder / "mine" / "samples.jsonl").read_text().splitlines()]
    held_out = [row for row in samples if row["split"] == "eval"]
    assert held_out
    assert all(row["scores"]["score"] == len(row["continuation"].split()) for row in held_out)


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("ppo", ["drpo.yaml", "reset.propotion=1"], "ppo.py: reset.propotion: Key 'propotion' not in"),
        ("drpo", ["own.yaml", "data.columns.prompt=query"], "drpo.py: no column 'query'"),
    ],
    ids=["recipe", "data"],
)
def test_an_error_is_one_message_on_standard_error(folder, script, arguments, message):
    done = finished(plain(script), *arguments, "run_dir=failed", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith(message), done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout
    assert not (folder / "failed").exists()


def test_a_disk_that_refuses_and_ctrl_c_are_one_message(monkeypatch, capsys, tmp_path):
    def write(recipe):
        (tmp_path / "none" / "x").write_text("")

    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match=r"script.py: .*No such file or directory.*none/x"):
        main(OnlineRecipe, "demo/drpo.yaml", write)
    with pytest.raises(SystemExit) as left:
        main(OnlineRecipe, "demo/drpo.yaml", interrupt)
    assert left.value.code == 130
    assert capsys.readouterr().err == "script.py: stopped; what is on disk is kept\n"


@pytest.mark.parametrize("script", ["judge", "label", "neuron_shift"])
def test_scripts_of_one_process_refuse_several(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit, match=f"{script}.py: this runs in one process: start it with python"):
        runpy.run_path(str(ROOT / "launch" / f"{script}.py"), run_name="__main__")


@pytest.fixture
def fails(folder, monkeypatch) -> Callable[..., str]:
    """`fails("recipe.yaml", "key=value", ...)` is the one message with which the script leaves."""
    monkeypatch.chdir(folder)
    forget_precision()

    def start(*arguments: str, recipe_class: type = OnlineRecipe, run=train_online) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        with pytest.raises(SystemExit) as left:
            main(recipe_class, "demo/drpo.yaml", run)
        assert isinstance(left.value.code, str) and left.value.code.startswith("script.py: ")
        return left.value.code

    yield start
    forget_precision()
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["drpo.yaml", "reset.propotion=1"], ["reset.propotion", "known keys there: ", "reset.proportion"]),
        (["drpo.yaml", "resett.proportion=1"], ["resett", "reset,"]),
        (["drpo.yaml", "reset.proportion=2"], ["reset.proportion must be >= 0 and <= 1, got 2"]),
        (["drpo.yaml", "num_steps=many"], ["num_steps", "many"]),
        (["drpo.yaml", "reset.source=refrence"], ["reset.source", "refrence"]),
        (["drpo.yaml", "optim.warmup_steps=400"], ["optim.warmup_steps is 400, it must be below num_steps"]),
        (["drpo.yaml", "critic.warmup_steps=400"], ["critic.warmup_steps is 400"]),
        (["drpo.yaml", "reset=1"], ["reset is a section"]),
        (["nowhere.yaml"], ["no recipe nowhere.yaml", "demo/drpo.yaml", "tldr/drpo_1b.yaml"]),
        (["broken.yaml"], ["broken.yaml is not valid YAML"]),
        (["drpo.yaml", "sft.yaml"], ["one recipe at most", "drpo.yaml", "sft.yaml"]),
        (["drpo.yaml", "seed", "3"], ["one recipe at most", "written section.key=value"]),
        (["--learning-rate"], ["unknown flag --learning-rate", "section.key=value"]),
        (["drpo.yaml", "--seed=3"], ["--seed"]),
        (["drpo.yaml", "reward.function=null"], ["give reward.path", "or reward.function"]),
        (["drpo.yaml", "reward.path=rm"], ["reward.path cannot be given together with reward.function"]),
        (
            ["drpo.yaml", "reward.function=no_module:score"],
            ["reward.function", "no_module", "looked on sys.path"],
        ),
        (["drpo.yaml", "reward.function=my_rewards:scores"], ["no function scores", "'score'"]),
        (["drpo.yaml", "reward.function=my_rewards:not_a_function"], ["no function not_a_function"]),
        (["drpo.yaml", "reward.function=my_rewards.score"], ["must be written module:function"]),
        (
            ["drpo.yaml", "reward.function=null", "reward.path=./none"],
            ["reward.path: no folder './none'", "sft/"],
        ),
        (["drpo.yaml", "model.path=./none"], ["no folder './none'"]),
        (["drpo.yaml", "model.path=null"], ["no policy to train: give model.path"]),
        (["own.yaml", "data.path=missing.jsonl"], ["no file or folder missing.jsonl", "own.jsonl"]),
        (["own.yaml"], ["no column prompt", "question, good, bad", "columns.prompt"]),
        (
            ["own.yaml", "data.columns={prompt: question, chosen: good, rejected: worse}"],
            ["no column 'worse' (data.columns.rejected)", "question, good, bad"],
        ),
        (
            ["own.yaml", "data.columns.prompt=question", "data.eval_split=test"],
            ["test", "own.jsonl"],
        ),
        (
            ["own.yaml", "data.columns.prompt=question", "data.eval_fraction=0.2"],
            ["reset.source=reference", "set reset.proportion=0"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in " ".join(value) else None,
)
def test_mistakes_in_a_recipe_are_named(fails, arguments, named):
    message = fails(*arguments)
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"model": {"architecture": {}, "vocab_size": None}},
            "no model: give model.path, or model.architecture",
        ),
        ({"optim": {"warmup_steps": 9}}, "optim.warmup_steps is 9, it must be below the number of steps, 2"),
        ({"model": {"architecture": {"model_type": "gpt_nexo"}}}, "did you mean gpt_neo, gpt_neox"),
        ({"loss_on": "prompt"}, "loss_on"),
    ],
)
def test_mistakes_in_an_sft_recipe_are_named(fails, tmp_path, changes, named):
    recipe = write_recipe(tmp_path / "sft.yaml", replaced({**SFT, "run_dir": str(tmp_path / "run")}, changes))
    assert named in fails(str(recipe), recipe_class=SFTRecipe, run=train_sft)


def replaced(recipe: dict, changes: dict) -> dict:
    """`changes` merged in, but an architecture as a whole."""
    result = merged(recipe, changes)
    if "architecture" in changes.get("model", {}):
        result["model"]["architecture"] = changes["model"]["architecture"]
    return result


# --- the demo's own inputs ------------------------------------------------------------------------------


def test_a_stage_of_the_demo_runs_alone_under_any_launcher(monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "ACCELERATE_USE_CPU",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = single_process_environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} & environment.keys()
    assert not [name for name in environment if name.startswith(("ACCELERATE_", "TORCHELASTIC_"))]
    assert environment["OMP_NUM_THREADS"] == "1" and environment["PATH"] == os.environ["PATH"]
