"""Judges that compare scores: the demo's true reward by its own rule, a real reward model, broken functions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from online_runs import forget_precision
from tiny_models import tiny_model
from tiny_tokenizers import single_bytes

from drpo.config import ConfigError
from drpo.data.tasks.demo import DemoConfig, make_demo
from eval.completions.rows import prompt_id_of
from eval.judging.judge import JudgeStopped
from eval.judging.judges import JudgeConfig
from eval.judging.matchup import Matchup, Question, questions_of
from eval.judging.score_judges import CHUNK, ScoreJudge, function_judge, reward_model_judge
from eval.judging.verdict import Verdict, combine_all
from reward_models.model import RewardModel

POST = "SUBREDDIT: r/camping\nPOST: we have lamp mug but need rope soap tent\nTL;DR:"


def compare(a: str, b: str, **changes) -> Matchup:
    return Matchup(prompt_id_of(POST), POST, "x", a, "y", b, **changes)


def verdicts_of(judge: ScoreJudge, questions: Sequence[Question]) -> list[Verdict]:
    async def collect():
        return [verdict async for verdict in judge.verdicts(questions)]

    return asyncio.run(collect())


def true_reward_judge(**changes) -> ScoreJudge:
    config = JudgeConfig(kind="function", function="drpo.data.tasks.demo:true_rewards", **changes)
    return function_judge(config, Path("unused"))


@pytest.mark.parametrize(
    ("a", "b", "ended", "winner", "scores"),
    [
        (" rope soap tent", " rope", True, "a", (4.0, -0.25)),
        (" rope soap", " rope", True, "b", (-0.5, -0.25)),
        (" lamp", "", True, "tie", (-2.0, -2.0)),
        (" rope soap tent", " rope soap tent", False, "b", (-2.75, 4.0)),
    ],
)
def test_the_true_reward_judges_by_its_rule(a, b, ended, winner, scores):
    """4 for the complete summary, -0.25 a right item, -2 a wrong one, for saying nothing and for not ending."""
    for question in questions_of([compare(a, b, ended_a=ended)], "both", 0):
        (verdict,) = verdicts_of(true_reward_judge(), [question])
        assert (verdict.winner, verdict.scores, verdict.status) == (winner, scores, "ok")


def test_both_orders_agree_and_the_reference_is_known():
    made = make_demo(DemoConfig(num_eval=CHUNK + 40), "prompts", "eval")
    compared = [
        Matchup(prompt_id_of(r.prompt), r.prompt, "x", r.chosen, "y", r.rejected, reference=r.completion)
        for r in made
    ]
    seen = []

    def score(completions):
        seen.extend(completions)
        return torch.tensor([float(len(c.response)) for c in completions])

    judgments = combine_all(verdicts_of(ScoreJudge(score), questions_of(compared, "both", 0)))
    assert len(judgments) == CHUNK + 40 and all(j.consistent for j in judgments)
    assert [j.score for j in judgments] == [
        0.5 if len(c.response_a) == len(c.response_b) else float(len(c.response_a) > len(c.response_b))
        for c in compared
    ]
    assert seen[0].record.completion == made[0].completion and seen[0].record.prompt == made[0].prompt


def test_scores_within_the_margin_are_a_tie():
    questions = questions_of([compare(" rope soap tent", " rope"), compare(" rope soap", " rope")], "both", 0)
    winners = [v.winner for v in verdicts_of(true_reward_judge(tie_margin=0.25), questions)]
    assert winners == ["a", "a", "tie", "tie"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_a_failure(value):
    judge = ScoreJudge(lambda completions: [value if c.response == " rope" else 1.0 for c in completions])
    first, second = verdicts_of(
        judge, [Question(compare(" rope", " x"), "ab"), Question(compare(" y", " x"), "ab")]
    )
    assert (first.status, first.winner) == ("failed", None) and "not both finite" in first.detail
    assert (second.status, second.winner) == ("ok", "tie")


def test_a_function_with_another_number_of_scores_is_refused():
    with pytest.raises(ValueError, match="1 scores for 2 completions"):
        verdicts_of(ScoreJudge(lambda completions: [1.0]), [Question(compare(" a", " b"), "ab")])


def test_a_stop_ends_it():
    judge = true_reward_judge()
    judge.stop("enough")
    with pytest.raises(JudgeStopped, match="enough"):
        verdicts_of(judge, [Question(compare(" a", " b"), "ab")])


@pytest.fixture
def reward_model(tmp_path):
    """A folder as training leaves it, and the model in it."""
    forget_precision()
    tokenizer = single_bytes()
    model = RewardModel.from_causal_lm(tiny_model("gpt_neox", vocab_size=len(tokenizer)), seed=3).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    yield tmp_path / "rm", model, tokenizer
    forget_precision()


@torch.no_grad()
def test_a_reward_model_judges_as_it_scores(reward_model, tmp_path):
    """Also an empty response; one without an end is read as if it ended there, since the head learned at the stop
    token alone. The oracle is the model, row by row."""
    folder, model, tokenizer = reward_model
    prompt = "Q: sky?"
    texts = [(" blue", True), ("", True), (" green", False), (" it is blue", True)]

    def alone(text: str) -> float:
        ids = [*tokenizer(prompt + text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        hidden = model.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden @ model.head.weight[0] + model.head.bias - model.config.centre)

    compared = [
        Matchup("id", prompt, "x", a, "y", b, seed=i, ended_a=ended_a, ended_b=ended_b)
        for i, ((a, ended_a), (b, ended_b)) in enumerate(itertools.combinations(texts, 2))
    ]
    judge = reward_model_judge(JudgeConfig(kind="reward_model", path=str(folder), batch_size=3), tmp_path)
    verdicts = verdicts_of(judge, [Question(c, "ba") for c in compared])
    for matchup, verdict in zip(compared, verdicts, strict=True):
        scores = (alone(matchup.response_a), alone(matchup.response_b))
        assert verdict.scores == pytest.approx(scores, abs=1e-5)
        assert verdict.winner == ("a" if scores[0] > scores[1] else "b")


def test_a_judge_must_be_named(tmp_path):
    with pytest.raises(ConfigError, match="judge.function must name a callable"):
        function_judge(JudgeConfig(kind="function"), tmp_path)
    with pytest.raises(ConfigError, match="judge.path must name a reward model"):
        reward_model_judge(JudgeConfig(kind="reward_model"), tmp_path)
