"""A whole evaluation of a tiny reward model and of a tiny policy, held against scores computed one by one."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from online_runs import forget_precision
from reward_model_folders import save_reward_model, score_alone
from tiny_models import ARCHITECTURES, tiny_model
from tiny_tokenizers import CHATML, byte_level, single_bytes
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from drpo.config import ConfigError
from drpo.data.load import DataConfig, load_examples
from drpo.data.records import DataError
from drpo.data.tasks.demo import true_reward
from drpo.models.tokenizer import load_tokenizer
from eval.completions.rows import read_completions
from eval.reward_models.best_of_k import ChoiceRow, choice_completions, read_choices
from eval.reward_models.evaluate import evaluate_reward_model
from eval.reward_models.recipe import EvaluateRewardModelRecipe
from reward_models.model import RewardModel

DATA = {"task": "demo", "demo": {"num_train": 24, "num_eval": 30}}
NUM_RESPONSES = 3
CHOICES = [
    {
        "prompt": "POST: a",
        "chosen": [" lamp"],
        "rejected": [" mug", " rope", " tent"],
        "subset": "Focus",
        "id": 1,
    },
    {
        "prompt": "POST: b",
        "chosen": [" rope"],
        "rejected": [" rope", " tent", " mug"],
        "subset": "Focus",
        "id": 2,
    },
    {"prompt": "POST: c", "chosen": [" mug", " lamp"], "rejected": [" tent"], "subset": "Ties", "id": 3},
]


def evaluate(run_dir: Path, models: list[dict], **changes) -> dict:
    forget_precision()
    recipe = {"run_dir": str(run_dir), "mixed_precision": "no", "data": DATA, "batch_size": 7}
    evaluate_reward_model(EvaluateRewardModelRecipe(models=models, **(recipe | changes)), print)
    forget_precision()
    return json.loads((run_dir / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def folders(policy_folder, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(str(policy_folder))
    save_reward_model(folder / "rm", tokenizer)
    tiny_model("gpt_neox", vocab_size=300, seed=5).save_pretrained(folder / "dpo")
    tokenizer.save_pretrained(folder / "dpo")
    tiny_model("gpt_neox", vocab_size=300, seed=6).save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    return {name: folder / name for name in ("rm", "dpo", "sft", "choices.jsonl")} | {"policy": policy_folder}


@pytest.fixture(scope="module")
def models(folders) -> list[dict]:
    implicit = {"path": str(folders["dpo"]), "reference": str(folders["sft"]), "beta": 0.5, "name": "dpo"}
    return [{"path": str(folders["rm"]), "name": "rm"}, implicit]


@pytest.fixture(scope="module")
def run(folders, models, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("run") / "evaluation"
    best_of_n = {
        "policy": str(folders["policy"]),
        "true_reward": "drpo.data.tasks.demo:true_rewards",
        "num_responses": NUM_RESPONSES,
        "num_prompts": 4,
        "max_response_length": 6,
    }
    return evaluate(
        folder,
        models,
        best_of_k=str(folders["choices.jsonl"]),
        best_of_n=best_of_n,
        num_references=20,
        num_alone=5,
    ), folder


@pytest.fixture(scope="module")
def alone(folders) -> list[list[float]]:
    """Scores of the chosen and the rejected response of each pair under the reward model, one by one."""
    model = RewardModel.from_pretrained(folders["rm"]).eval()
    data = DataConfig(**DATA)
    examples = load_examples(data, load_tokenizer(str(folders["rm"])), "pairs", held_out_only=True).eval
    assert len(examples) == 30
    return [
        [score_alone(model, list(e.query_ids), list(ids)) for ids in (e.chosen_ids, e.rejected_ids)]
        for e in examples
    ]


def test_what_a_run_leaves(run):
    evaluation, folder = run
    plots = {"reliability.png", "margin_by_length.png", "scores.png", "best_of_n.png"}
    assert {path.name for path in folder.iterdir()} == plots | {
        *("evaluation.json", "evaluation.md", "evaluation.html", "pairs.jsonl", "config.yaml", "best_of_n")
    }
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    page = (folder / "evaluation.md").read_text()
    for title in (
        "Accuracy",
        "Calibration",
        "Length bias",
        "Agreement of the models",
        "Best of k",
        "Best of n: rm",
    ):
        assert f"\n## {title}\n" in page
    assert all(f"]({name})" in page for name in plots)
    assert [model["name"] for model in evaluation["models"]] == ["rm", "dpo"]
    data = evaluation["data"]
    assert (data["task"], data["split"], data["num_pairs"], data["num_prompts"]) == ("demo", "eval", 30, 30)
    assert len(data["pairs_sha256"]) == len(evaluation["models"][0]["weights_sha256"]) == 64
    assert evaluation["models"][0]["centre"] == 0.5


def test_scores_and_accuracy_are_those_of_single_responses(run, alone):
    evaluation, folder = run
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    found = [[line["models"]["rm"][name] for name in ("chosen", "rejected")] for line in lines]
    assert np.array(found) == pytest.approx(np.array(alone), abs=2e-5)
    result = evaluation["models"][0]
    right = sum(chosen > rejected for chosen, rejected in alone)
    assert result["accuracy"]["right"] == right and result["accuracy"]["accuracy"]["value"] == right / 30
    assert result["scores"]["chosen"]["mean"] == pytest.approx(np.mean(alone, axis=0)[0], abs=2e-5)
    assert sum(group["n"] for group in result["score_gaps"].values()) == 30
    invariance = result["invariance"]
    assert invariance["num_pairs"] == 5 and invariance["changed_outcomes"] == 0
    assert 0 <= invariance["max_difference"] < 2e-5
    assert result["references"]["distribution"]["n"] == 20


def test_lengths_are_in_tokens_with_the_stop_token(run):
    evaluation, folder = run
    lines = [json.loads(line)["models"]["rm"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    longer = sum(line["chosen_tokens"] > line["rejected_tokens"] for line in lines)
    equal = sum(line["chosen_tokens"] == line["rejected_tokens"] for line in lines)
    judge = evaluation["models"][0]["length"]["length_judge"]
    assert (judge["right"], judge["ties"]) == (longer, equal)


@torch.no_grad()
def test_a_policy_is_measured_by_its_implicit_rewards(run, folders):
    evaluation, folder = run
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("dpo", "sft")
    )
    (example, *_) = load_examples(
        DataConfig(**DATA), load_tokenizer(str(folders["dpo"])), "pairs", held_out_only=True
    ).eval
    sums = []
    for model in (policy, reference):
        ids = torch.tensor([[*example.query_ids, *example.chosen_ids]])
        logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(example.query_ids) - 1 : -1]
        sums.append(float(logprobs[range(len(example.chosen_ids)), example.chosen_ids].sum()))
    first = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert first["models"]["dpo"]["chosen"] == pytest.approx(0.5 * (sums[0] - sums[1]), abs=2e-5)
    result = evaluation["models"][1]
    assert (result["kind"], result["beta"]) == ("implicit rewards", 0.5)
    assert result["reference_sha256"] != result["weights_sha256"]


def test_models_are_compared_with_each_other(run):
    evaluation, folder = run
    lines = [json.loads(line)["models"] for line in (folder / "pairs.jsonl").read_text().splitlines()]
    signs = [
        [np.sign(line[name]["chosen"] - line[name]["rejected"]) for name in ("rm", "dpo")] for line in lines
    ]
    (found,) = evaluation["agreement"]
    assert found["signs"]["agreement"] == pytest.approx(np.mean([one == other for one, other in signs]))
    accuracies = [model["accuracy"]["accuracy"]["value"] for model in evaluation["models"]]
    assert evaluation["accuracy_over_models"]["value"] == pytest.approx(np.mean(accuracies))


def test_all_models_are_measured_as_one(folders, tmp_path):
    """The lower of two scores, by hand from the scores of the pairs; the gain is over the mean of the members."""
    tokenizer = load_tokenizer(str(folders["rm"]))
    save_reward_model(tmp_path / "other", tokenizer, seed=4)
    members = [{"path": str(folders["rm"]), "name": "one"}, {"path": str(tmp_path / "other"), "name": "two"}]
    rules = [{"combine": "min"}, {"combine": "mean_minus_std", "coef": 0.5}]
    found = evaluate(tmp_path / "run", members, ensembles=rules, num_references=0, num_alone=0)
    lines = [
        json.loads(line)["models"] for line in (tmp_path / "run" / "pairs.jsonl").read_text().splitlines()
    ]
    scores = np.array(
        [[[line[m][side] for side in ("chosen", "rejected")] for m in ("one", "two")] for line in lines]
    )
    member_accuracy = (scores[..., 0] > scores[..., 1]).mean()
    expected = {
        "min of all": scores.min(1),
        "mean_minus_std of all, coef 0.5": scores.mean(1) - 0.5 * scores.std(1),
    }
    assert [ensemble["name"] for ensemble in found["ensembles"]] == list(expected)
    for ensemble, combined in zip(found["ensembles"], expected.values(), strict=True):
        right = int((combined[:, 0] > combined[:, 1]).sum())
        assert ensemble["accuracy"]["right"] == right
        assert ensemble["gain"]["value"] == pytest.approx(right / 30 - member_accuracy)
    assert "\n## Ensembles\n" in (tmp_path / "run" / "evaluation.md").read_text()


def test_the_best_of_n_is_that_of_all_subsets(run, folders):
    evaluation, folder = run
    model = RewardModel.from_pretrained(folders["rm"]).eval()
    tokenizer = load_tokenizer(str(folders["rm"]))
    prompts: dict[str, list[tuple[float, float]]] = {}
    for row in read_completions(folder / "best_of_n" / "completions.jsonl"):
        ids = row.meta["response_ids"]
        score = score_alone(model, tokenizer(row.prompt)["input_ids"], ids)
        prompts.setdefault(row.prompt, []).append((score, true_reward(row.prompt, row.response, row.ended)))
    assert len(prompts) == 4 and {len(rows) for rows in prompts.values()} == {NUM_RESPONSES}
    result = evaluation["models"][0]["best_of_n"]
    assert result["n"] == [1, 2, 3]
    for n in (1, 2, 3):
        best = [np.mean([max(part) for part in combinations(rows, n)], axis=0) for rows in prompts.values()]
        score, reward = np.mean(best, axis=0)
        assert result["curves"]["score"][n - 1]["value"] == pytest.approx(score, abs=2e-5)
        assert result["curves"]["true_reward"][n - 1]["value"] == pytest.approx(reward)


def test_the_best_of_k_shares_the_credit_of_ties(run, folders):
    model = RewardModel.from_pretrained(folders["rm"]).eval()
    tokenizer = load_tokenizer(str(folders["rm"]))
    eos = tokenizer.eos_token_id

    def scores(row: dict, name: str) -> list[float]:
        query = tokenizer(row["prompt"])["input_ids"]
        return [score_alone(model, query, [*tokenizer(text)["input_ids"], eos]) for text in row[name]]

    first, tied = CHOICES[0], CHOICES[1]
    credit = float(scores(first, "chosen")[0] > max(scores(first, "rejected")))
    tied_scores = scores(tied, "rejected")
    credit += 0.5 if tied_scores[0] == max(tied_scores) else 0
    found = run[0]["models"][0]["best_of_k"]
    assert list(found["subsets"]) == ["Focus"] and found["num_rows"] == 3
    assert found["subsets"]["Focus"]["accuracy"]["value"] == pytest.approx(credit / 2)
    right, wrong = scores(CHOICES[2], "chosen"), scores(CHOICES[2], "rejected")
    assert found["ties"] == {
        "n": 1,
        "all_right_first": float(min(right) > max(wrong)),
        "gap_exceeds_spread": float(min(right) - max(wrong) > max(right) - min(right)),
        "rewardbench_2": None,
    }


def test_rows_with_the_ids_of_rewardbench_2_have_its_score(folders, tmp_path):
    """One prompt of both kinds: 0.3 for each that is right, 0.2 for each gap above the spread, 0.01 of the margin."""
    rows = [
        {"prompt": "POST: c", "chosen": [" mug"], "rejected": [" tent"], "subset": "Ties", "id": "ref:7"},
        {
            "prompt": "POST: c",
            "chosen": [" mug", " lamp"],
            "rejected": [" tent"],
            "subset": "Ties",
            "id": "tied:7",
        },
    ]
    (tmp_path / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"best_of_k": str(tmp_path / "ties.jsonl"), "num_references": 0, "num_alone": 0}
    found = evaluate(tmp_path / "run", [{"path": str(folders["rm"])}], **settings)["models"][0]["best_of_k"][
        "ties"
    ]
    model, tokenizer = RewardModel.from_pretrained(folders["rm"]).eval(), load_tokenizer(str(folders["rm"]))
    query, eos = tokenizer("POST: c")["input_ids"], tokenizer.eos_token_id
    mug, lamp, tent = (
        score_alone(model, query, [*tokenizer(text)["input_ids"], eos]) for text in (" mug", " lamp", " tent")
    )
    gap, other_gap, spread = min(mug, lamp) - tent, mug - tent, abs(mug - lamp)
    expected = 0.3 * (gap > 0) + 0.3 * (other_gap > 0) + 0.2 * (gap > spread)
    expected += 0.2 * (min(gap, other_gap) > spread) + 0.01 * np.tanh(min(gap, other_gap) / spread - 1)
    assert found["n"] == 2 and found["rewardbench_2"]["overall"] == pytest.approx(expected, abs=1e-5)


def test_any_file_of_pairs_is_evaluated_by_its_columns(folders, models, tmp_path):
    rows = [
        {"prompt": f"Q{i // 2}:", "chosen": f" yes {i}", "rejected": f" no, never {i}", "kind": "ab"[i % 2]}
        for i in range(10)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "own", "path": str(file), "eval_fraction": 0.0}
    found = evaluate(tmp_path / "run", models[:1], data=data, split="train", subsets=["kind"])
    assert (found["data"]["num_pairs"], found["data"]["num_prompts"]) == (10, 5)
    (result,) = found["models"]
    assert result["accuracy"]["accuracy"]["num_prompts"] == 5
    assert [(name, part["n"]) for name, part in result["subsets"]["kind"].items()] == [("a", 5), ("b", 5)]
    assert result["length"]["by_length"]["chosen shorter"]["n"] == 10
    assert result["length"]["length_judge"]["accuracy"]["value"] == 0
    assert result["score_gaps"] is None and result["best_of_n"] is None
    assert "## Accuracy by kind" in (tmp_path / "run" / "evaluation.md").read_text()


def test_so_many_pairs_are_chosen_by_their_texts(models, tmp_path):
    """The same ones in a file of another order, and every one of a larger number."""
    rows = [{"prompt": f"Q{i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(30)]
    lines = []
    for name, own in (("one", rows), ("other", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        data = {"task": "own", "path": str(tmp_path / f"{name}.jsonl"), "eval_fraction": 0.0}
        settings = {"data": data, "split": "train", "num_references": 0}
        found = evaluate(tmp_path / name, models[:1], **settings, num_pairs=8)
        assert found["data"]["num_pairs"] == 8
        text = (tmp_path / name / "pairs.jsonl").read_text().splitlines()
        lines.append([json.loads(line)["prompt_id"] for line in text])
    assert lines[0] == lines[1][::-1] and len(set(lines[0])) == 8
    assert evaluate(tmp_path / "all", models[:1], **settings, num_pairs=31)["data"]["num_pairs"] == 30


def test_a_classifier_from_elsewhere_is_evaluated(folders, tmp_path):
    config = AutoConfig.for_model(
        "gpt_neox", **ARCHITECTURES["gpt_neox"], vocab_size=300, num_labels=1, pad_token_id=0
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    load_tokenizer(str(folders["rm"])).save_pretrained(tmp_path / "classifier")
    found = evaluate(
        tmp_path / "run", [{"path": str(tmp_path / "classifier")}], num_references=0, num_alone=0
    )
    (result,) = found["models"]
    assert (result["kind"], result["centre"]) == ("reward model", 0.0)
    assert result["accuracy"]["n"] == 30 and result["references"] is None and result["invariance"] is None


def test_models_that_read_other_pairs_are_refused(models, tmp_path):
    """By single bytes some responses are longer than the limit, which leaves their pairs out."""
    save_reward_model(tmp_path / "bytes", single_bytes())
    data = DATA | {"max_response_length": 12, "max_bad_fraction": 1.0}
    with pytest.raises(
        ConfigError, match=r"models: .*bytes reads other pairs than the first model \(\d+ and \d+\)"
    ):
        evaluate(tmp_path / "run", [models[0], {"path": str(tmp_path / "bytes")}], data=data)


def test_choices_go_through_the_chat_template():
    tokenizer = byte_level(chat_template=CHATML)
    data = DataConfig(task="own", path="x.jsonl", chat_template=True)
    row = ChoiceRow("why not?", ("because",), ("help",), "Focus", "x.jsonl:1")
    first, second = choice_completions(row, tokenizer, data)
    query = "<|im_start|>user\nwhy not?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.query_ids) == query == tokenizer.decode(second.query_ids)
    assert tokenizer.decode(first.response_ids).startswith("because")
    assert tokenizer.decode(second.response_ids).startswith("help")
    assert first.record.chat.messages == ({"role": "user", "content": "why not?"},)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{}], "models\\[0\\].path must name a reward model"),
        (
            [{"path": "a", "beta": 0.1}],
            "models\\[0\\].beta is for implicit rewards and needs models\\[0\\].reference",
        ),
        ([{"path": "a", "reference": "b"}], "models\\[0\\].beta must be given with models\\[0\\].reference"),
        ([{"path": "a"}, {"path": "a"}], "models\\[1\\].name must differ, got 'a' twice"),
        ([], "models must name at least one reward model"),
    ],
)
def test_models_that_cannot_be_evaluated_are_refused(tmp_path, models, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path / "run", models)


def test_members_without_a_common_zero_are_refused_before_one_is_measured(folders, tmp_path, capsys):
    other = save_reward_model(tmp_path / "other", load_tokenizer(str(folders["rm"])), seed=4)
    other.config.centre = 0.0
    other.save_pretrained(tmp_path / "other")
    members = [{"path": str(folders["rm"])}, {"path": str(tmp_path / "other")}]
    with pytest.raises(
        ConfigError, match=r"models: '.*rm' was given a centre on references and '.*other' was not"
    ):
        evaluate(tmp_path / "run", members, ensembles=[{"combine": "mean"}])
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kinds", "combine", "message"),
    [
        (["rm"], "mean", "ensembles needs two or more models"),
        (["same", "same"], "mean", "models names a model twice"),
        (["rm", "dpo"], "mean", "ensembles needs models of one kind"),
        (
            ["dpo", "dpo"],
            "min",
            "ensembles must be mean: implicit rewards are known .* got \\['min'",
        ),
    ],
)
def test_ensembles_that_mean_nothing_are_refused(kinds, combine, message):
    implicit = {"reference": "sft", "beta": 0.1}
    models = [
        {"path": "same" if kind == "same" else f"{n}", "name": f"{n}", **(implicit if kind == "dpo" else {})}
        for n, kind in enumerate(kinds)
    ]
    with pytest.raises(ConfigError, match=message):
        EvaluateRewardModelRecipe(models=models, ensembles=[{"combine": combine}])


def test_settings_of_samples_need_a_policy():
    with pytest.raises(ConfigError, match="best_of_n.num_responses needs best_of_n.policy"):
        EvaluateRewardModelRecipe(best_of_n={"num_responses": 4})


def test_samples_of_one_prompt_are_refused_before_they_are_drawn(folders, models, tmp_path):
    data = DATA | {"demo": DATA["demo"] | {"num_eval": 1}}
    with pytest.raises(ConfigError, match="best_of_n.policy: the eval split of the data has one prompt"):
        evaluate(tmp_path / "run", models[:1], data=data, best_of_n={"policy": str(folders["policy"])})
    assert not (tmp_path / "run" / "best_of_n").exists()


def test_a_policy_that_is_its_own_reference_is_refused(folders, tmp_path):
    same = {"path": str(folders["dpo"]), "reference": str(folders["dpo"]), "beta": 0.1}
    with pytest.raises(ConfigError, match=r"models\[0\].reference: it has the weights of models\[0\].path"):
        evaluate(tmp_path / "run", [same])


def test_choices_that_cannot_be_read_are_refused(tmp_path):
    file = tmp_path / "choices.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": ["c"]}) + "\n")
    with pytest.raises(
        DataError, match="1 x wrong type\n.*choices.jsonl:1: chosen is not a list of at least one"
    ):
        read_choices(str(file))
    file.write_text(json.dumps({"prompt": "a", "chosen": ["b"]}) + "\n")
    with pytest.raises(DataError, match="has no column rejected; its columns are: prompt, chosen"):
        read_choices(str(file))
    for ids, message in (
        (["ref:1", "tied:1", "ref:1"], r"choices.jsonl:1 and .*choices.jsonl:3 have the same id, 'ref:1'"),
        (["ref:1", ""], r"choices.jsonl:2 has the id '' and others of Ties have ref:<n>"),
    ):
        row = {"prompt": "a", "chosen": ["b"], "rejected": ["c"], "subset": "Ties"}
        file.write_text("".join(json.dumps(row | {"id": name}) + "\n" for name in ids))
        with pytest.raises(DataError, match=message):
            read_choices(str(file))
