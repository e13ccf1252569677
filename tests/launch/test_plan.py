"""drpo plan: which recipe it reads, what it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model
from tiny_runs import CLEAN, ROOT, finished

GPUS, ONE_GPU = ["--gpus", "2x8"], ["--gpus", "24"]
DATA = {"task": "own", "path": "rows.jsonl", "max_prompt_length": 20, "max_response_length": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's config without weights, and one recipe a stage."""
    root = tmp_path_factory.mktemp("plan")
    tiny_model("llama").config.save_pretrained(root / "policy")
    base = {"data": DATA, "model": {"path": "policy"}}
    batch = {"size": 8, "microbatch_size": 2}
    recipes = {
        "sft": base | {"batch": batch, "sample": {"num_prompts": 4}, "loss_on": "all"},
        "reward_model": base | {"batch": batch, "score": {"num_references": 0}},
        "dpo": base | {"batch": batch, "loss": {"name": "dpo"}},
        "kto": base | {"batch": batch, "loss": {"name": "kto"}},
        "drpo": base
        | {
            "reward": {"path": "policy"},
            "rollout": {"batch_size": 8, "rollouts_per_prompt": 2, "max_response_length": 10},
            "ppo": {"microbatch_tokens": 100},
        },
        "drpo_trunk": base
        | {
            "model": {"path": "policy", "trainable_layers": 1},
            "reward": {"path": "policy"},
            "rollout": {"batch_size": 8, "rollouts_per_prompt": 4, "max_response_length": 4},
            "ppo": {"microbatch_size": 8},
        },
        "either": base | {"batch": batch},
    }
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return root


def plan(folder: Path, *arguments: str):
    command = [sys.executable, "-m", "launch.cli", "plan", *arguments]
    return finished(command, cwd=folder, env={**CLEAN, "PYTHONPATH": str(ROOT)})


def plans(folder: Path, *arguments: str) -> dict:
    done = plan(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


PHASES = {
    "sft": ["sampling", "update", "step"],
    "reward_model": ["update", "step"],
    "dpo": ["sampling", "update", "step"],
    "kto": ["sampling", "update", "step"],
    "drpo": ["rollout", "reward", "scoring", "update", "step"],
    "drpo_trunk": ["rollout", "reward", "scoring", "update", "step"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "kto")) for name in PHASES]
)
def test_stage_is_known_by_its_recipe_and_has_its_phases(folder, name):
    result = plans(folder, f"{name}.yaml", *ONE_GPU)
    command = {"reward_model": "reward-model", "kto": "dpo", "drpo_trunk": "drpo"}.get(name, name)
    assert result["command"] == command
    (each,) = result["plans"]
    assert (each["accelerate"], each["processes"]) == ("single_gpu", 1)
    check_phases(each, PHASES[name])


@pytest.mark.parametrize("name", ["sft", pytest.param("drpo", marks=pytest.mark.slow)])
def test_several_gpus_get_a_plan_for_each_way_to_divide_a_run(folder, name):
    result = plans(folder, f"{name}.yaml", *GPUS)["plans"]
    found = [(each["accelerate"], each["processes"]) for each in result]
    several = ["multi_gpu", "zero2", "zero3", "zero3_offload"]
    assert found == [("single_gpu", 1), *((launcher, 2) for launcher in several)]
    for each in result:
        check_phases(each, PHASES[name])


def check_phases(shown: dict, expected: list[str]) -> None:
    """The phases in their order, and the peak the largest of their sums."""
    assert list(shown["phases_gib"]) == expected
    totals = {phase: sum(parts.values()) for phase, parts in shown["phases_gib"].items()}
    assert shown["peak_gib"] == pytest.approx(max(totals.values())) == totals[shown["peak_phase"]]


def test_parts_of_an_online_run_are_those_of_its_models(folder):
    """llama of width 32: policy, critic, reference and reward model in float32 with engine.mixed_precision=no."""
    (single,) = plans(folder, "drpo", "drpo.yaml", "engine.mixed_precision=no", *ONE_GPU)["plans"]
    config = json.loads((folder / "policy" / "config.json").read_text())
    width, hidden, vocab, layers = 32, 64, config["vocab_size"], 2
    attention = 2 * width * width + 2 * width * (width // 2)  # 4 heads, 2 of keys and values
    backbone = vocab * width + layers * (attention + 3 * width * hidden + 2 * width) + width
    policy, critic = backbone + vocab * width, backbone + width + 1
    assert single["parameters"]["critic"] == pytest.approx(critic, abs=64)  # and rotary frequencies
    update = single["phases_gib"]["update"]
    assert update["policy"] * 2**30 == pytest.approx(4 * policy, abs=256)
    assert update["reference"] == pytest.approx(update["policy"], abs=256 / 2**30)
    assert update["reward model"] * 2**30 == pytest.approx(4 * critic, abs=256)
    assert update["gradients"] * 2**30 == 4 * (policy + critic)
    assert update["optimizer"] * 2**30 == 8 * (policy + critic)
    cache = single["phases_gib"]["rollout"]["key-value cache"] * 2**30
    # Keys and values of 2 heads of 8, 2 layers, 8 rows; one may begin with 9 tokens of a response, another lack 10.
    assert cache == 4 * 2 * 2 * 8 * layers * 8 * (20 + 10 + 9)


@pytest.mark.parametrize(("estimator", "tokens"), [("reinforce_pp", 20 + 10), ("vine", 20 + 10 + 9)])
def test_continued_states_begin_within_a_response_as_resets_do(folder, estimator, tokens):
    settings = [f"advantage.estimator={estimator}", "reset.proportion=0", "engine.mixed_precision=no"]
    first = plans(folder, "drpo", "drpo.yaml", *settings, *ONE_GPU)["plans"][0]
    cache = first["phases_gib"]["rollout"]["key-value cache"] * 2**30
    assert cache == 4 * 2 * 2 * 8 * 2 * 8 * tokens


def test_base_in_4_bits_is_sized_by_hand_and_weights_that_are_cut_are_left_out(folder):
    """llama of width 32 over LoRA of rank 2: rows of a multiple of 64 weights, 32 bytes and a scale for each 64."""
    settings = ["model.lora.r=2", "model.load_in_4bit=true", "engine.mixed_precision=no"]
    result = plans(folder, "drpo", "drpo.yaml", *settings, *GPUS)["plans"]
    assert [each["accelerate"] for each in result] == ["single_gpu", "multi_gpu", "zero2"]
    vocab = json.loads((folder / "policy" / "config.json").read_text())["vocab_size"]
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]  # two layers of each
    adapter = 2 * sum(2 * (outputs + inputs) for outputs, inputs in shapes)
    blocks = [outputs for outputs, _ in shapes]
    packed = 2 * sum(33 * each + 4 + 4 for each in blocks)  # the scale of the scales, and their mean
    dense = 2 * vocab * 32 + 2 * 2 * 32 + 32
    update = result[0]["phases_gib"]["update"]
    assert update["policy"] * 2**30 == pytest.approx(4 * (dense + adapter) + packed, abs=256)
    assert update["critic"] * 2**30 == pytest.approx(4 * (adapter + 33), abs=300)  # the base is the policy's
    weights = dense + 2 * sum(outputs * inputs for outputs, inputs in shapes)
    assert result[0]["parameters"]["policy"] == pytest.approx(weights + adapter, abs=64)


def test_tied_output_embedding_is_counted_once(folder, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).config.save_pretrained(tmp_path)
    counts = [
        plans(folder, "sft", "sft.yaml", f"model.path={path}", *ONE_GPU)["plans"][0]["parameters"]
        for path in (folder / "policy", tmp_path)
    ]
    vocab = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert counts[0]["policy"] - counts[1]["policy"] == vocab * 32


def test_table_names_parts_verdict_and_configs(folder):
    shown = plan(folder, "drpo", "drpo.yaml", "--gpus", "2x1", "--accelerate", "zero2").stdout
    for text in (
        "GiB on one of 2 1 GB, zero2",
        "reward model",
        "key-value cache",
        "optimizer",
        "communication",
    ):
        assert text in shown
    assert "does NOT fit" in shown  # DeepSpeed's bucket alone has 10^9 bytes
    assert shown.index("single_gpu") > shown.index("accelerate configs")


def test_chunk_of_logits_has_the_responses_of_a_micro_batch(folder):
    """Both responses of a pair, and not the rows of held-out samples."""
    sizes = []
    for name, rows in (("dpo", 2), ("dpo", 4), ("sft", 4)):
        settings = [f"batch.microbatch_size={rows}", "loss_on=response"][: 2 if name == "sft" else 1]
        (single,) = plans(folder, f"{name}.yaml", *settings, *ONE_GPU)["plans"]
        sizes.append(single["logits_chunk_gib"]["update"])
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)
    assert sizes[2] == pytest.approx(sizes[0], rel=0.1)


def test_micro_batch_of_tokens_holds_the_rows_that_a_process_has(folder):
    settings = ["batch.microbatch_tokens=10000", "engine.mixed_precision=no"]
    single, several, *_ = plans(folder, "reward-model", "reward_model.yaml", *settings, *GPUS)["plans"]
    rows = [each["phases_gib"]["update"]["activations"] for each in (single, several)]
    assert rows[0] == pytest.approx(2 * rows[1], rel=0.1)  # 8 pairs, and 4 on each of two


def test_vllm_holds_a_copy_of_the_policy_and_the_cache_that_it_is_given(folder):
    settings = ["rollout.engine=vllm", "rollout.vllm.kv_cache_gib=0.5", "engine.mixed_precision=no"]
    (single,) = plans(folder, "drpo", "drpo.yaml", *settings, *ONE_GPU)["plans"]
    rollout = single["phases_gib"]["rollout"]
    assert rollout["key-value cache"] == 0.5
    assert rollout["activations"] == pytest.approx(rollout["policy"], abs=256 / 2**30)


def test_vllm_on_servers_takes_nothing_of_the_trainers_gpus(folder):
    settings = ["rollout.engine=vllm", "rollout.vllm.urls=[http://gpu1:8000]"]
    (single,) = plans(folder, "drpo", "drpo.yaml", *settings, *ONE_GPU)["plans"]
    rollout = single["phases_gib"]["rollout"]
    assert not rollout.get("activations") and not rollout.get("key-value cache")


def test_offloaded_models_are_on_the_device_in_their_phase_alone(folder):
    settings = ["reward.offload=true", "kl.offload_reference=true"]
    (single,) = plans(folder, "drpo", "drpo.yaml", *settings, *ONE_GPU)["plans"]
    phases = single["phases_gib"]
    assert [name for name, parts in phases.items() if "reward model" in parts] == ["reward"]
    assert [name for name, parts in phases.items() if "reference" in parts] == ["scoring"]
    assert {"reward model", "reference"} <= single["host_gib"].keys()


def test_reward_model_that_is_not_there_is_sized_as_the_policy_and_said_so(folder):
    (single,) = plans(folder, "drpo", "drpo.yaml", "reward.path=runs/none/reward_model", *ONE_GPU)["plans"]
    assert single["notes"] == ["reward.path: 'runs/none/reward_model' is not there yet; sized as the policy"]
    assert single["parameters"]["reward model"] == single["parameters"]["critic"]


def test_every_reward_model_of_an_ensemble_and_of_the_parts_is_counted(folder):
    ensemble = ["reward.path=null", "reward.ensemble.paths=[runs/a,runs/b]"]
    single, several = (
        plans(folder, "drpo", "drpo.yaml", *settings, *ONE_GPU)["plans"][0] for settings in ([], ensemble)
    )
    names = [f"reward.ensemble.paths[{i}]: 'runs/{path}' is not there yet" for i, path in enumerate("ab")]
    assert [note.split(";")[0] for note in several["notes"]] == names
    for name in ("reward model", "reward model 2"):
        assert several["parameters"][name] == single["parameters"]["reward model"]
        assert name in several["phases_gib"]["update"]


def test_run_that_fits_nowhere_gets_advice(folder):
    result = plans(folder, "drpo", "drpo.yaml", "--gpus", "0.806")
    assert not any(each["fits"] for each in result["plans"])
    assert "model.gradient_checkpointing=true: recomputes activations" in result["advice"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["either.yaml", *GPUS],
            "sft and reward-model and dpo could read either.yaml: name the command first",
        ),
        (["drpo", "drpo.yaml", "--gpus", "8xZ9"], "--gpus: '8xZ9' is unknown"),
        (["drpo", "drpo.yaml", *GPUS, "--accelerate", "zero9"], "no accelerate config zero9"),
        (["drpo", "drpo.yaml", *GPUS, "data.max_prompt_length=null"], "data.max_prompt_length is null"),
        (["sft", "drpo.yaml", *GPUS], "ppo: Key 'ppo' not in 'SFTRecipe'"),
        (["sft", "sft.yaml", "--gpus", "3xH100"], "batch.size is 8, which does not divide over 3 processes"),
        (
            ["sft.yaml", "model.lora.r=2", "model.load_in_4bit=true", *GPUS, "--accelerate", "zero3"],
            "model.load_in_4bit does not work under ZeRO-3, which cuts weights",
        ),
        (GPUS, "a plan needs a recipe"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, arguments, message):
    done = plan(folder, *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
