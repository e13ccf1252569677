"""launch/compare.py: several policies and seeds in this process, two processes, a judge behind a real HTTP server."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from online_runs import DEMO, forget_precision, save_tiny_policy
from stub_judge_server import KEY, MODEL, StubServer, first_slot_wins, longer_wins
from tiny_runs import ddp, run, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo.config import ConfigError, load_recipe
from drpo.data.records import DataError
from drpo.run.stopped import RunStopped
from eval.comparing.compare import compare
from eval.comparing.recipe import CompareRecipe
from eval.completions.rows import CompletionRow, CompletionsWriter, prompt_id_of, read_completions

SCORES = {"true_reward": "drpo.data.tasks.demo:true_rewards"}
NUM = DEMO["num_eval"]


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Path:
    """runs/{base,a_0,a_1}/policy: a policy, and two that were moved from it at random."""
    import torch

    folder = tmp_path_factory.mktemp("policies")
    base = folder / "runs" / "base" / "policy"
    base.mkdir(parents=True)
    save_tiny_policy(base)
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(base)
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        other = folder / "runs" / f"a_{seed}" / "policy"
        model.save_pretrained(other)
        AutoTokenizer.from_pretrained(base).save_pretrained(other)
    run_folder = folder / "runs" / "a_0"
    (run_folder / "config.yaml").write_text("num_steps: 7\n")
    (run_folder / "metrics.jsonl").write_text("{}\n")
    rollout = {
        "split": "rollout",
        "origin": "x",
        "prompt": "post",
        "prefix": " rope",
        "continuation": " soap",
    }
    rows = [{**rollout, "step": step, "ended": True, "scores": {"score": 0.5}} for step in (1, 7)]
    (run_folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(policies, tmp_path, monkeypatch) -> Path:
    """A user's folder with the policies under runs/."""
    (tmp_path / "runs").symlink_to(policies / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUB_KEY", KEY)
    forget_precision()
    yield tmp_path
    forget_precision()


RECIPE = {
    "run_dir": "out",
    "systems": [
        {"name": "base", "policies": ["runs/base/policy"]},
        {"name": "A, moved", "policies": ["runs/a_0/policy", "runs/a_1/policy"], "setting": 1.0},
    ],
    "complete": {
        "mixed_precision": "no",
        "data": {"task": "demo", "demo": DEMO},
        "max_response_length": 8,
        "sampling": {"temperature": 1.0},
        "batch_size": 4,
    },
    "kl_reference": "runs/base/policy",
    "reward_functions": SCORES,
    "judging": {"judge": {"kind": "function", "function": "drpo.data.tasks.demo:true_rewards"}},
}


def recipe(folder: Path, **changes) -> CompareRecipe:
    return load_recipe(CompareRecipe, write_recipe(folder / "compare.yaml", {**RECIPE, **changes}), [])


def result_of(path: Path) -> dict:
    return json.loads((path.parent / "comparison.json").read_text())


def row(result: dict, name: str) -> dict:
    (found,) = (system for system in result["systems"] if system["name"] == name)
    return found


def against_stub(server: StubServer, **changes) -> dict:
    judge = {
        "model": MODEL,
        "base_url": server.url,
        "api_key_env": "STUB_KEY",
        "form": "json",
        "probe": False,
    }
    return {"prompt": "tldr-1", "judge": judge, "retry": {"base_delay": 0.01}, **changes}


def test_a_comparison_from_policies_to_report(folder, capsys):
    path = compare(recipe(folder, pairs="all"))
    assert path == Path("out/report.html") and path.stat().st_size > 10_000
    assert (folder / "out" / "report.md").is_file() and (folder / "out" / "config.yaml").is_file()
    result = result_of(path)
    assert [system["name"] for system in result["systems"]] == ["base", "A, moved", "reference"]
    base, moved, reference = result["systems"]
    assert base["values"]["kl"]["value"] == 0 and abs(moved["values"]["kl"]["value"]) > 0.01
    assert (moved["num_runs"], len(moved["values"]["true_reward"]["runs"])) == (2, 2)
    assert moved["values"]["true_reward"]["method"] == "seeds"
    assert reference["values"]["true_reward"]["value"] == 4 and reference["values"]["num_tokens"]["value"] > 5
    assert base["judged"]["wins"] == 0 and base["judged"]["losses"] == NUM
    assert len(result["examples"]) == 3 * NUM
    assert result["configs"] == {"A, moved/0": "num_steps: 7\n"}
    assert [(each["step"], each["prefix"]) for each in result["rollouts"]] == [(7, " rope")]
    assert {"base/0", "A, moved/0", "A, moved/1"} <= result["hashes"].keys()
    # 3 runs against the reference and 2 against each other, of NUM prompts
    assert result["ranking"]["num_comparisons"] == 5 * NUM
    assert "A, moved (2 seeds)" in capsys.readouterr().out


def test_a_policy_on_the_way_has_no_rollouts_of_later_steps(folder):
    for place in ("policies/policy_step_3", "policies/policy"):
        shutil.copytree("runs/a_0/policy", place)
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(f"runs/a_0/{name}", "policies")
    systems = [
        {"name": "early", "policies": ["policies/policy_step_3"]},
        {"name": "late", "policies": ["policies/policy"]},
    ]
    result = result_of(compare(recipe(folder, systems=systems, pairs="none")))
    assert [(each["system"], each["step"]) for each in result["rollouts"]] == [("early", 1), ("late", 7)]


def test_again_it_samples_nothing_and_finds_the_same(folder):
    first = result_of(compare(recipe(folder)))
    forget_precision()
    again = result_of(compare(recipe(folder)))
    first.pop("created"), again.pop("created")
    assert first == again
    texts = folder / "out" / "completions" / "A_moved_1" / "completions.jsonl"
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    texts.write_text("".join(json.dumps({**each, "response": " mine"}) + "\n" for each in rows))
    forget_precision()
    result = result_of(compare(recipe(folder)))
    shown = [each for each in result["examples"] if each["system"] == "A, moved" and each["run"] == 1]
    assert {each["response_a"] for each in shown} == {" mine"}, "what is there is not sampled again"


def test_the_kl_of_greedy_answers_is_measured_on_samples(folder):
    complete = {**RECIPE["complete"], "sampling": {"temperature": 0.0}}
    result = result_of(compare(recipe(folder, complete=complete, pairs="none", judging={})))
    assert result["judge"] is None and "win_rate" not in row(result, "base")["values"]
    assert abs(row(result, "A, moved")["values"]["kl"]["value"]) > 0.01
    assert all("kl" not in example["values"] for example in result["examples"])
    sampled = read_completions(folder / "out/completions/A_moved_0/sampled/completions.jsonl")
    greedy = read_completions(folder / "out/completions/A_moved_0/completions.jsonl")
    assert [each.prompt_id for each in sampled] == [each.prompt_id for each in greedy]
    assert [each.response for each in sampled] != [each.response for each in greedy]


def test_one_store_serves_all_and_a_rerun_pays_nothing(folder):
    with StubServer(longer_wins) as server:
        first = result_of(compare(recipe(folder, judging=against_stub(server))))
        asked = len(server.chats)
        forget_precision()
        again = result_of(compare(recipe(folder, judging=against_stub(server))))
        assert len(server.chats) == asked <= 3 * NUM * 2
    assert first["systems"] == again["systems"]
    assert first["judge"]["name"] == MODEL and first["judge"]["spent"]["calls"] == asked
    assert {path.name for path in (folder / "out").glob("*.sqlite")} == {"verdicts.sqlite"}
    answers = [each["text"] for example in first["examples"] for each in example["verdicts"]]
    assert all(answers)


def test_a_judge_that_takes_the_first_slot_finds_no_difference(folder):
    with StubServer(first_slot_wins) as server:
        result = result_of(compare(recipe(folder, judging=against_stub(server))))
    for name in ("base", "A, moved"):
        assert row(result, name)["values"]["win_rate"]["value"] == 0.5
        assert row(result, name)["judged"]["consistent"] == 0.0
    assert all(test["p_value"] == 1.0 for test in result["tests"])


def test_a_dry_run_asks_nothing_and_estimates_every_comparison(folder, capsys):
    with StubServer(longer_wins) as server:
        with pytest.raises(
            RunStopped, match=r"judging.budget.dry_run: nothing was asked. In all at most \d+ calls"
        ):
            compare(recipe(folder, judging=against_stub(server, budget={"dry_run": True})))
        assert server.chats == []
    out = capsys.readouterr().out
    assert out.count("calls, about") == 3 and "judging 3 of 3" in out


def test_another_system_may_stand_in_front(folder):
    compare(recipe(folder, systems=RECIPE["systems"][1:], pairs="none"))
    forget_precision()
    result = result_of(compare(recipe(folder, pairs="none")))
    assert [system["name"] for system in result["systems"]] == ["base", "A, moved", "reference"]


def test_without_pairs_a_recipe_needs_no_judge(folder):
    with StubServer(longer_wins) as server:
        result = result_of(compare(recipe(folder, judging=against_stub(server), pairs="none")))
        assert server.chats == []
    assert result["judge"] is None and row(result, "base")["judged"] is None


def test_what_a_pilot_paid_is_not_paid_again(folder):
    pilot = {**RECIPE["complete"], "num_prompts": 4}
    with StubServer(longer_wins) as server:
        compare(recipe(folder, run_dir="pilot", complete=pilot, judging=against_stub(server)))
        of_pilot, store = len(server.chats), "pilot/verdicts.sqlite"
        forget_precision()
        result = result_of(compare(recipe(folder, judging=against_stub(server, store=store))))
        asked = {chat.text for chat in server.chats}
        assert len(server.chats) == len(asked) > of_pilot > 0
    assert result["judge"]["spent"]["calls"] == len(asked)
    assert not (folder / "out" / "verdicts.sqlite").exists()


def test_references_are_those_of_the_systems_at_hand(folder):
    """The responses that are judged, and the ones that the report shows, after the references have changed."""
    compare(recipe(folder, pairs="none", run_dir="first"))
    lines = (folder / "first/completions/base_0/completions.jsonl").read_text().splitlines()
    for reference in ("rope", "soap"):
        rows = [{**json.loads(line), "system": reference, "reference": f" {reference}"} for line in lines]
        (folder / f"{reference}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        forget_precision()
        system = {"name": reference, "completions": [f"{reference}.jsonl"]}
        compare(recipe(folder, systems=[system], kl_reference=None))
        judged = read_completions(folder / "out/completions/reference_0/completions.jsonl")
        assert {each.response for each in judged} == {f" {reference}"} and len(judged) == NUM


def test_prompts_that_the_baseline_did_not_answer_have_no_example(folder):
    compare(recipe(folder, pairs="none", run_dir="first"))
    lines = (folder / "first/completions/base_0/completions.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:-1]))
    forget_precision()
    systems = [RECIPE["systems"][1], {"name": "base", "completions": ["some.jsonl"]}]
    result = result_of(compare(recipe(folder, systems=systems, baseline="base", pairs="none")))
    assert len(result["examples"]) == 2 * (NUM - 1) and row(result, "A, moved")["num_prompts"] == NUM


def test_the_kl_is_that_of_the_policies_without_the_tokens_that_are_never_sampled(folder):
    """The policies differ in a token that no response can hold, so as they were sampled they are one."""
    reference = AutoModelForCausalLM.from_pretrained("runs/base/policy")
    tokenizer = AutoTokenizer.from_pretrained("runs/base/policy")
    never = tokenizer(" rope").input_ids[-1]
    reference.get_output_embeddings().weight.data[never] *= -5
    reference.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    complete = {**RECIPE["complete"], "bad_tokens": tokenizer.convert_ids_to_tokens([never])}
    changes = {"systems": RECIPE["systems"][:1], "kl_reference": "reference", "pairs": "none"}
    free = result_of(compare(recipe(folder, run_dir="free", **changes)))
    forget_precision()
    kept = result_of(compare(recipe(folder, complete=complete, **changes)))
    assert abs(row(free, "base")["values"]["kl"]["value"]) > 0.01
    assert row(kept, "base")["values"]["kl"]["value"] == pytest.approx(0, abs=1e-5)


def test_responses_made_elsewhere_are_a_system(folder):
    compare(recipe(folder))
    forget_precision()
    files = ["out/completions/base_0/completions.jsonl"]
    systems = [RECIPE["systems"][1], {"name": "base", "completions": files}]
    result = result_of(compare(recipe(folder, systems=systems, run_dir="out2", baseline="base")))
    assert row(result, "base")["values"]["win_rate"] is None and row(result, "base")["values"]["kl"] is None
    assert row(result, "A, moved")["num_runs"] == 2 and "file_sha256" in result["hashes"]["base/0"]
    assert {example["baseline"] for example in result["examples"]} == {"base"}


def test_two_processes_find_what_one_finds(folder):
    alone = result_of(compare(recipe(folder)))
    file = write_recipe(folder / "two.yaml", {**RECIPE, "run_dir": "two"})
    out = run(ddp("compare"), str(file), cwd=folder)
    assert out.splitlines()[-1].endswith("two/report.html") and out.count("A, moved (2 seeds)") == 1
    both = json.loads((folder / "two" / "comparison.json").read_text())
    assert [system["judged"] for system in both["systems"]] == [
        system["judged"] for system in alone["systems"]
    ]
    for one, other in zip(alone["systems"], both["systems"], strict=True):
        for key, value in one["values"].items():
            if value is not None:
                assert other["values"][key]["value"] == pytest.approx(value["value"], abs=1e-5), key


WRONG = {
    "systems must name what is compared": {"systems": []},
    r"systems\[0\].policies or systems\[0\].completions must be given": {"systems": [{"name": "x"}]},
    r"systems\[0\].kl_references \(2\) must be as many as systems\[0\].policies \(1\)": {
        "systems": [{"name": "x", "policies": ["p"], "kl_references": ["a", "b"]}]
    },
    r"systems\[1\].name must differ .* got 'x' twice": {"systems": [{"name": "x", "policies": ["p"]}] * 2},
    "too much alike": {"systems": [{"name": "x y", "policies": ["p"]}, {"name": "x_y", "policies": ["p"]}]},
    r"systems\[0\].name cannot be 'reference'": {"systems": [{"name": "reference", "policies": ["p"]}]},
    "baseline must be reference or one of base, A, moved, got B": {"baseline": "B"},
    "complete.policy is set by the comparison itself": {"complete": {"policy": "p"}},
    "judging.system is set by the comparison itself": {"judging": {"system": "x"}},
    "baseline must have one run, .*: A, moved has 2 runs and base has 1": {"baseline": "A, moved"},
    r"systems\[0\].policies names p twice": {"systems": [{"name": "x", "policies": ["p", "p"]}]},
    "setting is nan; give a finite number": {
        "systems": [{"name": "x", "policies": ["p"], "setting": float("nan")}]
    },
    "all visible, got 'a.nb'": {"systems": [{"name": "a\nb", "policies": ["p"]}]},
    "at most 200 bytes": {"systems": [{"name": "x" * 201, "policies": ["p"]}]},
    "systems are too much alike, .*: X, x": {
        "systems": [{"name": name, "policies": ["p"]} for name in ("X", "x")]
    },
    "too much alike, or like reference": {"systems": [{"name": "Reference!", "policies": ["p"]}]},
    r"systems\[1\].policies\[0\]: no folder './none'": {
        "systems": [{"name": "a", "policies": ["runs/base/policy"]}, {"name": "b", "policies": ["./none"]}]
    },
    "kl_reference: no folder './none'": {"kl_reference": "./none"},
    "reward_functions.kl is the name of a column": {"reward_functions": {"kl": "a:b"}},
    "reward_functions.win_rate is the name of a column": {"reward_functions": {"win_rate": "a:b"}},
    "reward_functions.f='.a:b' must be written module:function": {"reward_functions": {"f": ".a:b"}},
    "num_examples must be >= 0": {"num_examples": -1},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_work_is_refused_before_anything_is_sampled(folder, message):
    with pytest.raises(ConfigError, match=message):
        compare(recipe(folder, **WRONG[message]))
    assert not (folder / "out" / "completions").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "raises",
            "reward_functions.f='bad_rewards:raises' does not score.*RuntimeError at .*bad_rewards.py:1: boom",
        ),
        (
            "no_python:score",
            "reward_functions.f='no_python:score': no_python fails when it is imported: SyntaxError",
        ),
        ("nothing", "reward_functions.f='bad_rewards:nothing' does not score the responses: TypeError"),
        ("few", f"reward_functions.f='bad_rewards:few' returned 1 scores for {NUM} responses"),
        ("no_number", f"f: the reward function gave {NUM} scores that are not finite"),
    ],
)
def test_a_reward_function_that_fails_is_named(folder, function, message):
    (folder / "bad_rewards.py").write_text(
        "def raises(completions): raise RuntimeError('boom')\n"
        "def nothing(completions): return None\n"
        "def few(completions): return [1.0]\n"
        "def no_number(completions): return [float('nan')] * len(completions)\n"
    )
    (folder / "no_python.py").write_text("def score(:")
    functions = {"f": function if ":" in function else f"bad_rewards:{function}"}
    with pytest.raises(ValueError, match=message) as failed:
        compare(recipe(folder, pairs="none", reward_functions=functions, systems=RECIPE["systems"][:1]))
    assert isinstance(failed.value, ConfigError | DataError)


def test_names_of_any_script_and_with_markup_are_shown_as_they_are(folder, capsys):
    names = ["[/red] 基準", "[bold] 学習"]
    systems = [
        {"name": name, "policies": [f"runs/{run}/policy"]}
        for name, run in zip(names, ("base", "a_0"), strict=True)
    ]
    result = result_of(compare(recipe(folder, systems=systems, pairs="all", title="[/x]")))
    assert [system["name"] for system in result["systems"]] == [*names, "reference"]
    assert "[/x]" in capsys.readouterr().out
    assert len(list((folder / "out" / "judgments").glob("*/*/judgments.jsonl"))) == 3


def test_systems_of_other_prompts_are_refused_before_the_judge_is_asked(folder):
    compare(recipe(folder, pairs="none", run_dir="first"))
    lines = (folder / "first/completions/base_0/completions.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[1:]))
    forget_precision()
    systems = [*RECIPE["systems"][1:], {"name": "base", "completions": ["some.jsonl"]}]
    with StubServer(longer_wins) as server:
        with pytest.raises(
            DataError, match="no response of base to 1 of the 6 prompts that the policies are asked"
        ):
            compare(recipe(folder, systems=systems, pairs="all", judging=against_stub(server)))
        assert server.chats == []


def test_damaged_weights_are_told(folder):
    shutil.copytree("runs/a_0/policy", "cut")
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match="the policy 'cut' cannot be loaded: "):
        compare(recipe(folder, systems=[{"name": "cut", "policies": ["cut"]}], pairs="none"))


def test_a_file_without_the_system_is_refused_by_name(folder):
    compare(recipe(folder, pairs="none", judging={}))
    forget_precision()
    files = ["out/completions/base_0/completions.jsonl"]
    with pytest.raises(DataError, match="no responses of system 'gpt'; there are: base"):
        compare(recipe(folder, systems=[{"name": "gpt", "completions": files}], run_dir="out2"))


def test_policies_with_other_tokenizers_have_no_kl(folder):
    other = folder / "other"
    AutoModelForCausalLM.from_pretrained("runs/base/policy").save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained("runs/base/policy")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        compare(recipe(folder, kl_reference=str(other)))


def test_a_copy_of_a_policy_is_no_second_seed(folder):
    copy = folder / "copy"
    copy.symlink_to(folder / "runs" / "a_0" / "policy")
    system = {"name": "A", "policies": ["runs/a_0/policy", str(copy)]}
    with pytest.raises(ConfigError, match="hold the same weights; name each run once"):
        compare(recipe(folder, systems=[system], pairs="none", judging={}))


def own_prompts(folder: Path, num: int, **columns) -> dict:
    rows = [{"prompt": f"post number {i}", **columns} for i in range(num)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "own", "path": "own.jsonl", "eval_fraction": 0.5}
    return {**RECIPE["complete"], "data": data}


def test_prompts_without_references_are_refused_before_anything_is_sampled(folder):
    with pytest.raises(
        ConfigError, match="baseline=reference needs the dataset's own responses, and .* have none"
    ):
        compare(recipe(folder, complete=own_prompts(folder, 8), reward_functions={}))
    assert not (folder / "out" / "completions").exists()


def test_a_file_may_answer_more_prompts_than_are_asked_and_they_are_counted(folder, capsys):
    complete = own_prompts(folder, 12, completion=" rope")
    rows = [
        CompletionRow("gpt", prompt_id_of(f"post number {i}"), f"post number {i}", " soap", True, None, 0)
        for i in range(12)
    ]
    CompletionsWriter(folder / "gpt.jsonl", {}).write(rows)
    systems = [RECIPE["systems"][0], {"name": "gpt", "completions": ["gpt.jsonl"]}]
    result = result_of(
        compare(
            recipe(folder, complete=complete, systems=systems, pairs="none", judging={}, reward_functions={})
        )
    )
    base, gpt, _ = result["systems"]
    assert base["num_prompts"] == gpt["num_prompts"] < 12
    left_out = 12 - base["num_prompts"]
    assert (
        f"gpt.jsonl: {left_out} of 12 responses are to prompts that the policies are not asked"
        in capsys.readouterr().out
    )
    # A file that was mended is read anew, and does not meet what was read of it before.
    forget_precision()
    (folder / "gpt.jsonl").unlink()
    CompletionsWriter(folder / "gpt.jsonl", {}).write([replace(row, response=" mended") for row in rows])
    again = result_of(
        compare(
            recipe(folder, complete=complete, systems=systems, pairs="none", judging={}, reward_functions={})
        )
    )
    assert {each["response_a"] for each in again["examples"] if each["system"] == "gpt"} == {" mended"}
