"""A judge as a part of the reward: shares of the win by hand, its store and its budget."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from online_runs import forget_precision, run_online
from stub_judge_server import KEY, MODEL, Reply, Shown, StubServer

from drpo.config import ConfigError, make_section
from drpo.data.records import DataError, Record
from drpo.engine import Engine, EngineConfig
from drpo.reward_functions import with_located_errors
from drpo.rewards import Completion
from drpo.run.stopped import RunStopped
from drpo.trainers.online_recipe import RewardConfig
from eval.judging.reward import judge_reward
from reward_models.sources import reward_from

POST = "POST: we have lamp mug but need rope soap\nTL;DR:"
REFERENCE = " rope soap"


def rollout(response: str, reference: str | None = REFERENCE, post: str = POST) -> Completion:
    record = Record(post, completion=reference, origin="posts.jsonl:3")
    return Completion(post, response, True, [1], [2], record)


def recipe_file(folder: Path, **settings) -> str:
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "judge"), **settings}))
    return str(path)


@pytest.fixture
def by_true_reward(tmp_path) -> str:
    return recipe_file(tmp_path, judge={"kind": "function", "function": "drpo.data.tasks.demo:true_rewards"})


def test_a_win_a_tie_and_a_loss_against_the_reference(by_true_reward):
    """The reference is complete, worth 4, against an unfinished summary at most 4; the second post has a faulty one."""
    faulty = " mug mug"
    rollouts = [rollout(REFERENCE), rollout(" rope"), rollout(REFERENCE, faulty), rollout(REFERENCE)]
    scored = judge_reward(by_true_reward)(rollouts)
    assert scored.scores.tolist() == [0.5, 0.0, 1.0, 0.5]
    assert scored.details["undecided"].tolist() == [0.0] * 4


def test_a_prompt_without_a_reference_is_named(by_true_reward):
    with pytest.raises(DataError, match="posts.jsonl:3 has no reference for the judge"):
        judge_reward(by_true_reward)([rollout(" rope", None)])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"system": "policy"}, "judge.yaml: system has no place here"),
        ({"completions": ["x.jsonl"]}, "judge.yaml: completions has no place here"),
        ({}, "judge.yaml: judge.model must name the model"),
        ({"judge": {"model": "m"}}, "judge.yaml: prompt must say what the judge is asked"),
        (
            {"judge": {"model": "m"}, "prompt": "tldr-1", "budget": {"max_usd": 1}},
            "judge.yaml: budget.max_usd needs",
        ),
        ({"judge": {"kind": "function"}}, "judge.yaml: judge.function must name a callable"),
        ({"judge": {"kind": "reward_model", "path": "x"}}, "judge.yaml: judge.kind cannot be reward_model"),
        ({"budget": {"dry_run": True}}, "judge.yaml: budget.dry_run asks nothing"),
        ({"budget": {"max_dollars": 3}}, "budget.max_dollars"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_at_the_start(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        judge_reward(recipe_file(tmp_path, **settings))


# --- a model behind an API --------------------------------------------------------------------------------


def prefers_rope(shown: Shown, number: int) -> str:
    has_rope = ["rope" in response for response in (shown.a, shown.b)]
    return "tie" if has_rope[0] == has_rope[1] else ("A" if has_rope[0] else "B")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Make a recipe file of a judge behind the stub server, and the server."""
    monkeypatch.setenv("STUB_KEY", KEY)
    with StubServer(prefers_rope) as server:

        def make(**settings) -> str:
            judge = {"model": MODEL, "base_url": server.url, "api_key_env": "STUB_KEY", "form": "json"}
            return recipe_file(tmp_path, prompt="tldr-1", judge={**judge, "probe": False}, **settings)

        yield make, server


def calls_in(store: Path) -> int:
    with closing(sqlite3.connect(store)) as database:
        return database.execute("SELECT count(*) FROM calls").fetchone()[0]


def test_answers_are_stored_and_asked_for_once(served, tmp_path):
    """Two orders for each different response; a rollout that repeats another costs nothing."""
    make, server = served
    path = make()
    rollouts = [rollout(" rope"), rollout(" mug"), rollout(" mug")]
    assert judge_reward(path)(rollouts).scores.tolist() == [0.5, 0.0, 0.0]
    assert len(server.chats) == calls_in(tmp_path / "judge" / "verdicts.sqlite") == 4
    assert judge_reward(path)(rollouts[::-1]).scores.tolist() == [0.0, 0.0, 0.5]
    assert len(server.chats) == 4


def test_a_spent_budget_stops_the_run_and_keeps_the_answers(served, tmp_path):
    make, server = served
    with pytest.raises(RunStopped, match="judge.yaml stopped: .*max_calls"):
        judge_reward(make(budget={"max_calls": 2}))([rollout(" rope"), rollout(" mug")])
    assert len(server.chats) == 2 == calls_in(tmp_path / "judge" / "verdicts.sqlite")


def test_processes_have_stores_of_their_own_and_share_the_budget(served, tmp_path, monkeypatch):
    make, server = served
    path = make(budget={"max_calls": 5})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        score = judge_reward(path)
        assert score([rollout(" rope")]).scores.tolist() == [0.5]
        assert calls_in(tmp_path / "judge" / f"rank_{rank}" / "verdicts.sqlite") == 2
        with pytest.raises(RunStopped, match="max_calls"):
            score([rollout(" mug")])
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        ConfigError, match=r"judge.yaml: budget.max_calls \(5\) is less than one call for each of 8"
    ):
        judge_reward(path)


def test_a_spent_budget_ends_a_run_as_a_stop_also_where_the_judge_is_a_part(served):
    make, _ = served
    part = with_located_errors(judge_reward(make(budget={"max_calls": 2})), "reward.parts[0].function")
    with pytest.raises(RunStopped, match="^the judge of .*judge.yaml stopped: .*max_calls"):
        part([rollout(" rope"), rollout(" mug")])


def test_more_failures_than_allowed_stop_the_run(served):
    make, server = served
    server.behaviour = lambda shown, number: Reply(
        status=400, body={"error": {"message": "no", "code": "bad"}}
    )
    with pytest.raises(RunStopped, match=r"did not answer 2 of 2 questions, more than max_failed=0"):
        judge_reward(make())([rollout(" rope")])
    scored = judge_reward(make(max_failed=1.0, max_undecided=1.0))([rollout(" rope")])
    assert scored.details["undecided"].tolist() == [1.0]


def test_undecided_rollouts_are_counted_and_too_many_stop_the_run(served):
    make, server = served
    server.behaviour = lambda shown, number: "nothing of use"
    with pytest.raises(RunStopped, match="left 1 of 1 rollouts undecided, more than max_undecided=0.05"):
        judge_reward(make())([rollout(" rope")])
    scored = judge_reward(make(max_undecided=1.0))([rollout(" rope")])
    assert scored.scores.tolist() == [0.5] and scored.details["undecided"].tolist() == [1.0]


# --- a resumed run ----------------------------------------------------------------------------------------

PROMPT = {
    "name": "mine-1",
    "question": "Which is better?",
    "material": "Post",
    "noun": "Summary",
    "label": "Better",
}


def identity_of(folder: Path, prompt: dict[str, str] = PROMPT, judge: dict | None = None, **settings) -> str:
    (folder / "prompt.yaml").write_text(yaml.safe_dump(prompt))
    judge = {"model": MODEL, "base_url": "http://127.0.0.1:9/v1", "probe": False, "form": "text"} | (
        judge or {}
    )
    return judge_reward(
        recipe_file(folder, prompt=str(folder / "prompt.yaml"), judge=judge, **settings)
    ).identity


def test_a_judge_is_identified_by_what_its_verdicts_depend_on(tmp_path):
    first = identity_of(tmp_path)
    assert first.startswith(f"the judge {MODEL} with the settings ")
    same = [
        {"run_dir": str(tmp_path / "elsewhere")},
        {"budget": {"max_calls": 7}},
        {"retry": {"timeout": 5.0}},
        {"limits": {"concurrency": 2}},
        {"max_undecided": 0.5},
        {"max_failed": 0.5},
        {"judge": {"api_key_env": "KEY"}},
        {"judge": {"base_url": "http://127.0.0.1:8/v1"}},
        {"judge": {"temperature": 0.0}},
    ]
    assert {identity_of(tmp_path, **settings) for settings in same} == {first}
    others = [
        {"judge": {"model": "another"}},
        {"judge": {"temperature": 1.0}},
        {"judge": {"max_output_tokens": 5}},
        {"orders": "one"},
        {"orders": "one", "seed": 3},
        {"ties": False},
        {"half_tie": "tie"},
        {"prompt": PROMPT | {"question": "Which is shorter?"}},
    ]
    assert len({first, *(identity_of(tmp_path, **settings) for settings in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "settings, minutes",
    [
        ({"retry": {"max_elapsed": 300.0, "timeout": 60.0}}, 18.0),  # asked up to three times
        ({"retry": {"max_elapsed": 300.0, "timeout": 60.0}, "judge": {"max_reasks": 0}}, 6.0),
        ({"judge": {"backend": "batch", "max_reasks": 1}}, 2 * 24 * 60.0),
    ],
)
def test_the_longest_wait_for_an_answer(tmp_path, settings, minutes):
    judge = {"model": MODEL, "probe": False, "form": "text"} | settings.pop("judge", {})
    reward = judge_reward(recipe_file(tmp_path, prompt="tldr-1", judge=judge, **settings))
    assert reward.wait_minutes == minutes


def test_a_run_is_not_resumed_with_another_judge(policy_folder, tmp_path):
    part = {"name": "judge", "function": "eval.judging.reward:judge_reward"}

    def train(num_steps: int, **settings) -> int:
        judge = {"kind": "function", "function": "drpo.data.tasks.demo:true_rewards"} | settings.pop(
            "judge", {}
        )
        section = {
            "parts": [part | {"recipe": recipe_file(tmp_path, judge=judge, **settings)}],
            "function": None,
        }
        forget_precision()
        engine = Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
        reward = reward_from(make_section(RewardConfig, section), engine, "")
        changes = {"reward": section, "checkpoint": {"every": 1}, "num_steps": num_steps}
        return len(run_online(policy_folder, tmp_path / "run", changes, reward))

    assert train(2) == 2
    message = (
        "reward.parts/judge: this run was trained on the scores of the judge drpo.data.tasks.demo:true_rewards with "
        "the settings [0-9a-f]+, and the judge .* is there now"
    )
    with pytest.raises(ConfigError, match=message):
        train(2, judge={"tie_margin": 1.5})
    assert train(2, max_undecided=0.5) == 2, "what changes no verdict may change"
    forget_precision()
