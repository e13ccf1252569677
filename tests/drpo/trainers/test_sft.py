"""SFT: which tokens carry loss, against a loop over tokens; and whole runs from scratch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from offline_runs import run_sft
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.data.encode import Example
from drpo.data.load import load_examples
from drpo.data.order import item_at
from drpo.data.records import Record
from drpo.models.loading import load_policy
from drpo.rollout.held_out import SampleConfig
from drpo.trainers.sft import SFTObjective, tokenizer_for

STOP, PAD = 1, 2
EXAMPLES = [
    Example(Record("a"), [3, 4, 5], completion_ids=[11, 12, STOP]),
    Example(Record("b"), [7] * 9, completion_ids=[13, STOP]),
    Example(Record("c"), [10], completion_ids=[20, 21, 22, 23, STOP]),
    Example(Record("d"), [9, 8, PAD, 6], completion_ids=[PAD, STOP]),  # ids of padding that count
]


@torch.no_grad()
def naive_losses(model, query: list[int], response: list[int], loss_on: str) -> list[float]:
    """-log softmax(logits)[token] of every target of one row, token by token from the model's own logits."""
    ids = query + response
    logits = model(torch.tensor([ids])).logits[0].double()
    first = 1 if loss_on == "all" else len(query)
    losses = []
    for position in range(first, len(ids)):
        weights = [math.exp(logit) for logit in (logits[position - 1] - logits[position - 1].max()).tolist()]
        losses.append(-math.log(weights[ids[position]] / sum(weights)))
    return losses


@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("loss_on, num_targets", [("response", 3 + 2 + 5 + 2), ("all", 5 + 10 + 5 + 5)])
def test_the_loss_is_that_of_a_loop_over_tokens(model_type, loss_on, num_targets):
    model = tiny_model(model_type)
    objective = SFTObjective(model, PAD, loss_on, torch.device("cpu"))
    batch = objective.collate(EXAMPLES)
    assert objective.num_targets(batch) == num_targets
    losses, further = objective(batch)
    expected = [sum(naive_losses(model, e.query_ids, e.completion_ids, loss_on)) for e in EXAMPLES]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert further == {}


def test_with_the_loss_on_responses_nothing_is_learnt_from_what_follows_prompt_tokens():
    model = tiny_model("gpt_neox")
    head = model.get_output_embeddings().weight
    objective = SFTObjective(model, PAD, "response", torch.device("cpu"))
    loss = objective(objective.collate(EXAMPLES[:1]))[0].sum()
    logprobs = torch.log_softmax(model(torch.tensor([[3, 4, 5, 11, 12]])).logits[0].double(), dim=-1)
    expected = -(logprobs[2, 11] + logprobs[3, 12] + logprobs[4, STOP])
    gradients = [torch.autograd.grad(total, head)[0] for total in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def oracle(model, tokenizer, examples, loss_on: str) -> tuple[float, int]:
    losses = [loss for e in examples for loss in naive_losses(model, e.query_ids, e.completion_ids, loss_on)]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_a_run_reports_losses_over_tokens_before_and_after(tmp_path, loss_on):
    """Step 1's training loss is that of the fresh model on the first batch, the last evaluation that of the result."""
    recipe, rows = run_sft(tmp_path / "run", loss_on=loss_on, eval={"every": 2, "num_examples": 7})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    splits = load_examples(recipe.data, tokenizer, "demonstrations")
    first = [item_at(splits.train, index, recipe.seed) for index in range(8)]
    fresh = load_policy(recipe.model, tokenizer, recipe.seed).eval()
    mean, num_targets = oracle(fresh, tokenizer, first, loss_on)
    assert rows[0]["train/loss"] == pytest.approx(mean, rel=1e-5)
    assert rows[0]["train/num_targets"] == num_targets

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy").eval()
    mean, _ = oracle(trained, tokenizer, splits.eval[:7], loss_on)
    assert rows[-1]["eval/loss"] == pytest.approx(mean, rel=1e-5)
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 3]


def test_micro_batches_do_not_change_the_result(tmp_path):
    whole, *others = (
        {"microbatch_size": 8},
        {"microbatch_size": 1},
        {"microbatch_size": 3},
        {"microbatch_tokens": 60},
    )
    runs = []
    for cut in (whole, *others):
        folder = tmp_path / str(len(runs))
        _, rows = run_sft(folder, batch=cut, eval={"every": 1})
        drop = ("time/", "perf/")
        metrics = [{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows]
        runs.append((metrics, load_file(folder / "policy" / "model.safetensors")))
    (whole_rows, whole_weights), *others = runs
    for rows, weights in others:
        for row, whole_row in zip(rows, whole_rows, strict=True):
            assert row == pytest.approx(whole_row, rel=1e-4)
        for name, weight in whole_weights.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0, msg=name)


def test_it_learns(tmp_path):
    _, rows = run_sft(tmp_path / "run", num_steps=20, batch={"microbatch_size": 8})
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5


def test_without_a_number_of_steps_it_passes_over_the_data(tmp_path):
    _, rows = run_sft(tmp_path / "run", num_steps=None, batch={"num_epochs": 1.5})
    assert [row["step"] for row in rows] == list(range(1, 9))  # 1.5 x 40 / 8 = 7.5


def test_a_pass_that_is_a_whole_number_of_steps_takes_that_number(tmp_path):
    """0.28 of 50 examples are 7 steps of 2, and 7.000000000000001 in floating point."""
    batch = {"num_epochs": 0.28, "size": 2, "microbatch_size": 2}
    _, rows = run_sft(tmp_path / "run", num_steps=None, batch=batch, data={"demo": {"num_train": 50}})
    assert len(rows) == 7


def test_samples_are_written_and_scored_at_every_evaluation(tmp_path):
    sample = {
        "num_prompts": 5,
        "max_response_length": 6,
        "reward_functions": {"true_reward": "drpo.data.tasks.demo:true_rewards"},
    }
    _, rows = run_sft(tmp_path / "run", sample=sample, eval={"every": 2})
    written = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for step in (2, 3):
        here = [row for row in written if row["step"] == step]
        assert len({row["prompt"] for row in here}) == 5
        rewards = [row["scores"]["true_reward"] for row in here]
        metrics = next(row for row in rows if row["step"] == step)
        assert metrics["eval/true_reward"] == pytest.approx(sum(rewards) / 5)
        assert metrics["eval/ended"] == sum(row["ended"] for row in here) / 5
        assert 1 <= metrics["eval/length"] <= 6


def test_the_tokenizer_is_the_models_or_is_trained_on_the_data(tmp_path):
    recipe, _ = run_sft(tmp_path / "run", num_steps=1)
    trained = tokenizer_for(recipe.model, recipe.data)
    assert len(trained) <= 300
    saved = tokenizer_for(type(recipe.model)(path=str(tmp_path / "run" / "policy")), recipe.data)
    assert saved.get_vocab() == trained.get_vocab()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_prompts": -1}, "^num_prompts must be >= 0"),
        ({"temperature": -0.1}, "^temperature must be >= 0"),
        ({"max_response_length": 0}, "^max_response_length must be >= 1"),
        ({"reward_functions": {"loss": "a:b"}}, "^reward_functions.loss is the name of another metric"),
    ],
)
def test_sample_values_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**changes)


def test_a_finished_run_returns_its_folder(tmp_path):
    _, rows = run_sft(tmp_path / "run", num_steps=1)
    _, again = run_sft(tmp_path / "run", num_steps=1)
    assert again == rows
    assert Path(tmp_path / "run" / "policy" / "README.md").exists()
