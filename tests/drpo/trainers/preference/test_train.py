"""Whole preference runs: what they report, stages, cuts into micro-batches, resuming, and learning."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hand_pairs import naive_logprobs
from offline_runs import RECIPE, run_preference
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.data.encode import Example
from drpo.data.load import load_examples
from drpo.data.records import DataError
from drpo.trainers.preference.recipe import METRICS

LOG_2 = pytest.approx(math.log(2), abs=1e-6)  # the DPO loss of a policy that is its own reference
LORA = {"lora": {"r": 4, "alpha": 32.0}}
NO_EVAL = {"eval": {"every": 0}}


def plain_model(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def margin(model: nn.Module, reference: nn.Module, example: Example, beta: float) -> float:
    with torch.no_grad():
        chosen, rejected = (
            (
                naive_logprobs(model, example.query_ids, ids)
                - naive_logprobs(reference, example.query_ids, ids)
            ).sum()
            for ids in (example.chosen_ids, example.rejected_ids)
        )
    return beta * float(chosen - rejected)


def test_the_evaluation_is_that_of_the_saved_policy_on_the_first_held_out_pairs(policy_folder, tmp_path):
    settings = {"loss": {"beta": 0.3}, "eval": {"every": 2, "num_examples": 5}}
    recipe, rows = run_preference(policy_folder, tmp_path / "run", **settings)
    splits = load_examples(recipe.data, AutoTokenizer.from_pretrained(policy_folder), "pairs")
    before, after = plain_model(policy_folder), plain_model(tmp_path / "run" / "policy")
    margins = [margin(after, before, example, 0.3) for example in splits.eval[:5]]
    losses = [math.log1p(math.exp(-h)) for h in margins]
    assert rows[-1]["eval/loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert rows[-1]["eval/reward_margin"] == pytest.approx(sum(margins) / 5, rel=1e-3)
    assert rows[-1]["eval/accuracy"] == sum(h > 0 for h in margins) / 5
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 3]
    assert rows[0]["train/loss"] == LOG_2 and rows[0]["train/num_targets"] == 8


def test_it_learns_its_pairs(preference_run):
    rows, _ = preference_run(
        **NO_EVAL,
        num_steps=25,
        data={"task": "demo", "demo": {"num_train": 16, "num_eval": 2}},
        loss={"beta": 1.0},
        batch={"size": 16, "microbatch_size": 16},
        optim={"learning_rate": 1e-3},
    )
    assert rows[-1]["train/accuracy"] == 1.0 and rows[-1]["train/loss"] < 0.1
    assert rows[-1]["train/chosen_reward"] > rows[-1]["train/rejected_reward"] + 2


@pytest.mark.parametrize(
    "loss",
    [{"name": "dpo", "dr_dpo": {"beta_prime": 0.3}}, {"name": "kto"}, {"name": "orpo", "odds_coef": 0.5}],
    ids=["dr_dpo", "kto", "orpo"],
)
def test_micro_batches_do_not_change_the_result(preference_run, loss):
    results = []
    for cut in ({"microbatch_size": 8}, {"microbatch_size": 3}, {"microbatch_tokens": 80}):
        rows, folder = preference_run(loss=loss, batch=cut, eval={"every": 3}, optim={"learning_rate": 1e-3})
        results.append((rows, load_file(folder / "policy" / "model.safetensors")))
    for rows, weights in results[1:]:
        for left, right in zip(rows[1:], results[0][0][1:], strict=True):
            assert left == pytest.approx(right, rel=2e-3, abs=1e-4)
        for name, weight in results[0][1].items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)


def test_micro_batches_hold_the_tokens_that_are_computed(preference_run):
    """A shared prompt counts once, so that fewer forwards fill the bound; none is larger."""
    bound, sizes = 500, []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if type(module).__name__ == "GPTNeoXModel" and output.last_hidden_state.requires_grad:
            sizes[-1].append(output.last_hidden_state.shape[:2])

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        for share_prompts in (True, False):
            sizes.append([])
            preference_run(
                share_prompts=share_prompts, batch={"size": 16, "microbatch_tokens": bound}, **NO_EVAL
            )
    finally:
        hook.remove()
    shared, separate = sizes
    assert max(rows * width for rows, width in shared + separate) <= bound
    assert len(shared) < len(separate)


def test_every_metric_of_an_evaluation_has_a_reserved_name(preference_run):
    """A reward function of that name would write over it."""
    seen = set()
    for loss in ({"name": "dpo", "dr_dpo": {}}, {"name": "kto"}):
        rows, _ = preference_run(num_steps=1, eval={"every": 1}, loss=loss)
        seen |= {key.removeprefix("eval/") for key in rows[0] if key.startswith("eval/")}
    assert seen - {"loss"} == METRICS


def test_samples_are_written_and_their_kl_is_to_the_reference(preference_run, policy_folder):
    rewards = {"true_reward": "drpo.data.tasks.demo:true_rewards"}
    sample = {"num_prompts": 4, "max_response_length": 6, "reward_functions": rewards}
    rows, folder = preference_run(sample=sample, eval={"every": 3})
    written = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in written}) == len(written) == 4
    for name in ("true_reward", "kl"):
        scores = [row["scores"][name] for row in written]
        assert rows[-1][f"eval/{name}"] == pytest.approx(sum(scores) / 4, rel=1e-5)
    elsewhere, _ = preference_run(
        sample={**sample, "kl_reference": str(policy_folder)},
        eval={"every": 3},
        loss={"name": "simpo", "target_margin": 0.5},
    )
    assert "eval/kl" in elsewhere[-1]
    without, _ = preference_run(sample=sample, eval={"every": 3}, reference={"sync_every": 1})
    assert "eval/kl" not in without[-1]  # a reference that moved is nothing to measure from


# --- data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [{"name": "dpo"}, {"name": "kto"}])
def test_nothing_need_be_held_out_when_nothing_is_evaluated(preference_run, tmp_path, loss):
    rows = [{"prompt": f"post {i}", "chosen": f" good{i}", "rejected": " bad"} for i in range(9)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "own", "path": str(tmp_path / "own.jsonl"), "eval_fraction": 0.0}
    rows, _ = preference_run(data=data, loss=loss, **NO_EVAL)
    assert len(rows) == 3


def test_noise_is_reported_for_flipped_and_clean_pairs(preference_run, capsys):
    data = {**RECIPE["data"], "noise": {"flip_rate": 0.4}}
    rows, _ = preference_run(data=data, loss={"dr_dpo": {"beta_prime": 0.5}}, eval={"every": 3})
    assert "noise: 18 of 40 pairs flipped (45.0%)" in capsys.readouterr().out
    for name in ("weight", "accuracy", "pair_loss"):
        share = rows[1]["train/flipped"]
        parts = share * rows[1][f"train/{name}_flipped"] + (1 - share) * rows[1][f"train/{name}_clean"]
        assert parts == pytest.approx(rows[1][f"train/{name}"])
    assert not [
        key for key in rows[-1] if key.startswith("eval/") and "flipped" in key
    ]  # held-out pairs are clean


def test_the_scores_of_pairs_become_offsets_in_training_and_not_in_the_evaluation(preference_run, tmp_path):
    """At the start h = 0, so the loss is log(1 + exp(offset)): log gap, the released one."""
    rows = [
        {
            "prompt": f"post {i}",
            "chosen": f" a{i}",
            "rejected": " b",
            "chosen_score": 4.0,
            "rejected_score": 1.0,
        }
        for i in range(20)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"task": "own", "path": str(tmp_path / "own.jsonl"), "eval_fraction": 0.3}
    odpo = {"loss": {"offset": {"alpha": 0.5}}, "num_steps": 1, "optim": {"learning_rate": 1e-9}}
    (row,), _ = preference_run(data=data, eval={"every": 1}, **odpo)
    assert row["train/loss"] == pytest.approx(math.log(1 + math.exp(0.5 * math.log(3))), rel=1e-5)
    assert row["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)


# --- stages -----------------------------------------------------------------------------------------------

STAGES = {**NO_EVAL, "num_steps": 3, "optim": {"learning_rate": 1e-3, "warmup_steps": 1}}


def test_every_stage_starts_from_the_policy_of_the_last_one_as_its_reference(preference_run):
    last, _ = preference_run(**STAGES, curriculum={"num_stages": 3})
    assert [row["step"] for row in last] == list(range(1, 10))
    assert [row["train/loss"] == LOG_2 for row in last] == [True, False, False] * 3
    initial, _ = preference_run(**STAGES, curriculum={"num_stages": 3, "reference": "initial"})
    assert [row["train/loss"] == LOG_2 for row in initial] == [True] + [False] * 8
    rates = [row["optim/learning_rate"] for row in last]
    assert rates == [0.0005, 0.001, 0.0005] * 3  # each has a warm-up and a descent of its own
    assert initial[:3] == last[:3]


def test_without_a_number_of_steps_every_stage_passes_over_its_own_pairs(preference_run):
    rows, _ = preference_run(
        **{**STAGES, "num_steps": None}, batch={"size": 8, "num_epochs": 0.5}, curriculum={"num_stages": 2}
    )
    assert len(rows) == 8  # 120 pairs: 60 a stage, of which half is 4 batches of 8, rounded up


def test_the_optimizer_is_reset_between_stages_or_not(preference_run):
    """Adam's first step after a reset has the size of the learning rate in almost every weight, a later one has not."""
    moved = {}
    for reset in (True, False):
        _, folder = preference_run(
            **{**STAGES, "optim": {"learning_rate": 1e-3, "schedule": "constant", "eps": 1e-12}},
            curriculum={"num_stages": 2, "reset_optimizer": reset},
            checkpoint={"every": 1, "keep": 9},
        )
        weights = [
            load_file(folder / "checkpoints" / f"step_{step}" / "model.safetensors") for step in (3, 4)
        ]
        moved[reset] = torch.cat([(weights[1][name] - weights[0][name]).flatten() for name in weights[0]])
        # What was saved between the stages is the empty state, so a resumed run starts with it too.
        state = torch.load(folder / "checkpoints" / "step_3" / "optimizer.bin", weights_only=False)["state"]
        steps = {float(entry["step"]) for entry in state.values()}
        assert steps == ({0.0} if reset else {3.0})
    sizes = {reset: change[change != 0].abs() for reset, change in moved.items()}
    near_rate = {reset: float(((size - 1e-3).abs() < 2e-5).float().mean()) for reset, size in sizes.items()}
    assert near_rate[True] > 0.95 and near_rate[False] < 0.5


def test_the_reference_sorts_the_pairs_from_easy_to_hard(policy_folder, tmp_path, capsys):
    """Its gaps, sorted and cut, are those of a loop over responses."""
    recipe, _ = run_preference(
        policy_folder,
        tmp_path / "run",
        **{**STAGES, "num_steps": 2},
        curriculum={"num_stages": 2, "order": "reference_gap", "pairs": "best_vs_worst"},
    )
    splits = load_examples(recipe.data, AutoTokenizer.from_pretrained(policy_folder), "ranked")
    model, gaps = plain_model(policy_folder), []
    with torch.no_grad():
        for example in splits.train:
            scores = example.record.scores
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            chosen, rejected = (
                float(naive_logprobs(model, example.query_ids, example.ranked_ids[place]).sum())
                for place in (best, worst)
            )
            gaps.append(chosen - rejected)
    gaps.sort(reverse=True)
    out = capsys.readouterr().out
    for stage, part in enumerate((gaps[:20], gaps[20:])):
        assert f"stage {stage}: 20 pairs, reference_gap {part[0]:.4g} to {part[-1]:.4g}" in out


def test_held_out_pairs_of_a_curriculum_are_all_of_the_first_prompts_whatever_their_gap(
    policy_folder, tmp_path
):
    settings = {"curriculum": {"num_stages": 1}, "eval": {"every": 1, "num_examples": 7}, "num_steps": 1}
    recipe, (row,) = run_preference(policy_folder, tmp_path / "run", **settings)
    splits = load_examples(recipe.data, AutoTokenizer.from_pretrained(policy_folder), "ranked")
    lengths = []
    for example in splits.eval:
        scores, ids = example.record.scores, example.ranked_ids
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if scores[a] != scores[b]]
        pairs.sort(key=lambda pair: scores[pair[1]] - scores[pair[0]])
        lengths += [(example, ids[a], ids[b]) for a, b in pairs]
    after = plain_model(tmp_path / "run" / "policy")
    with torch.no_grad():
        expected = [
            float(naive_logprobs(after, example.query_ids, ids).sum()) for example, ids, _ in lengths[:7]
        ]
    assert row["eval/chosen_logprobs"] == pytest.approx(sum(expected) / 7, rel=1e-4)
    assert len({example.record.prompt for example, _, _ in lengths[:7]}) == 2


def test_a_curriculum_needs_ranked_data(preference_run, tmp_path):
    rows = [{"prompt": f"post {i}", "chosen": f" a{i}", "rejected": " b"} for i in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no ranked rows: they need responses"):
        preference_run(data={"task": "own", "path": str(tmp_path / "own.jsonl")}, curriculum={})


# --- resuming ---------------------------------------------------------------------------------------------


def as_killed_after(run_dir: Path, step: int) -> None:
    """What a kill right after a checkpoint leaves: no later one, and no result."""
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run_dir / "policy")


RESUMED = {
    "inside a stage": ({"curriculum": {"num_stages": 2}}, 2),
    "between stages": ({"curriculum": {"num_stages": 2}}, 3),
    "in the second stage": ({"curriculum": {"num_stages": 2}}, 4),
    "stages, initial reference, optimizer kept": (
        {"curriculum": {"num_stages": 2, "reference": "initial", "reset_optimizer": False}},
        3,
    ),
    "stages by the reference": ({"curriculum": {"num_stages": 2, "order": "reference_gap"}}, 4),
    "TR-DPO at once": ({"reference": {"sync_every": 2}}, 2),
    "TR-DPO in small steps": ({"num_steps": 5, "reference": {"sync_every": 2, "sync_mix": 0.3}}, 3),
    "TR-DPO with LoRA": ({"model": LORA, "reference": {"sync_every": 1, "sync_mix": 0.3}}, 2),
    "TR-DPO in a curriculum": (
        {"curriculum": {"num_stages": 2, "reference": "initial"}, "reference": {"sync_every": 2}},
        3,
    ),
    "Dr. DPO under noise": (
        {"data": {**RECIPE["data"], "noise": {"flip_rate": 0.4}}, "loss": {"dr_dpo": {}}},
        1,
    ),
    "KTO": ({"loss": {"name": "kto"}}, 2),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_run_that_was_not_stopped_bit_for_bit(preference_run, case):
    changes, step = RESUMED[case]
    settings = {
        "num_steps": 3,
        "optim": {"learning_rate": 1e-3},
        "checkpoint": {"every": 1, "keep": 99},
        "eval": {"every": 3, "num_examples": 4},
        **changes,
    }
    whole, folder = preference_run(name="run", **settings)
    result = load_file(folder / "policy" / "model.safetensors")
    assert len({row["train/loss"] for row in whole}) > 1 and len(whole) > step
    as_killed_after(folder, step)
    resumed, _ = preference_run(name="run", **settings)
    assert resumed == whole
    again = load_file(folder / "policy" / "model.safetensors")
    assert again.keys() == result.keys() and all(torch.equal(again[name], result[name]) for name in result)


def test_a_run_with_a_cache_resumes_as_one_without(preference_run, tmp_path):
    """The run that fills the cache has the reference at hand, the resumed one has not; the metrics may not tell."""
    settings = {
        "model": LORA,
        "checkpoint": {"every": 1, "keep": 9},
        "eval": {"every": 3},
        "sample": {"num_prompts": 2, "max_response_length": 4},
        "reference": {"cache_dir": str(tmp_path / "cache")},
    }
    whole, folder = preference_run(name="run", **settings)
    as_killed_after(folder, 1)
    assert preference_run(name="run", **settings)[0] == whole
