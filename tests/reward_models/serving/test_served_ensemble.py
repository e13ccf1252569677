"""An ensemble behind a server: equal to the local one, with members of like and of different tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests
import torch
from reward_model_folders import save_reward_model
from reward_requests import conversation, plain, remote, rows_of
from reward_servers import LIMITS, serving
from tiny_tokenizers import CHATML, byte_level, single_bytes

from drpo.config import ConfigError
from drpo.engine import Engine
from drpo.trainers.reward_parts import EnsembleConfig
from reward_models.joint import ensemble
from reward_models.score import RewardModelScorer
from reward_models.serving.served import ServedModel


def members(
    folder: Path, engine: Engine, policy: Path | None, shared: bool = True
) -> list[RewardModelScorer]:
    """Three reward models, the last with another tokenizer unless `shared`."""
    for number in range(3):
        own = single_bytes() if shared or number < 2 else byte_level(vocab_size=300, bos=True)
        own.chat_template = CHATML
        save_reward_model(folder / f"rm{number}", own, seed=number)
    reads = None if policy is None else str(policy)
    paths = [str(folder / f"rm{number}") for number in range(3)]
    return [RewardModelScorer.load(path, engine, 4, "float32", reads, key="MODEL") for path in paths]


def served(scorers: list[RewardModelScorer], **settings) -> ServedModel:
    named = {f"rm{number}": scorer for number, scorer in enumerate(scorers)}
    return ServedModel(named, LIMITS, EnsembleConfig(paths=list(named), **settings))


@pytest.mark.parametrize("make", [plain, conversation])
@pytest.mark.parametrize("shared", [True, False], ids=["one tokenizer", "two tokenizers"])
@pytest.mark.parametrize("settings", [{"combine": "min"}, {"combine": "mean_minus_std", "coef": 0.5}])
def test_a_served_ensemble_scores_as_the_local_one(tmp_path, engine, policy, make, shared, settings):
    """Members of two tokenizers all get texts: no token ids suit both."""
    reads = policy if shared else None
    local = ensemble(members(tmp_path, engine, reads, shared), EnsembleConfig(paths=["a", "b"], **settings))
    expected = local(rows_of(make))
    with serving(served(members(tmp_path, engine, None, shared), **settings)) as url:
        reward = remote(url, engine, policy, "reward.batch_size=3", chat=make is conversation)
        scores = reward(rows_of(make))
        text = {"prompt": "Question 1:", "response": " no 1"}
        answer = requests.post(f"{url}/score", json={"rows": [text] * 2}, timeout=30).json()
    torch.testing.assert_close(torch.tensor(scores), expected.scores, atol=1e-5, rtol=0)
    assert (expected.details["spread"] > 1e-3).all(), "the members differ"
    assert reward.max_tokens == (60 if shared else None)
    assert len(answer["spread"]) == 2 and answer["spread"][0] == pytest.approx(answer["spread"][1], abs=1e-6)


def test_the_spread_is_the_members_standard_deviation(tmp_path, engine):
    scorers = members(tmp_path, engine, None)
    row = {"query_ids": [40, 41], "response_ids": [90, 10], "ended": False}
    alone = []
    for scorer in scorers:
        with serving(scorer) as url:
            tokenizer = requests.get(f"{url}/info", timeout=30).json()["tokenizer"]
            answer = requests.post(f"{url}/score", json={"rows": [row], "tokenizer": tokenizer}, timeout=30)
            assert answer.json().keys() == {"model", "scores"}
            alone += answer.json()["scores"]
    with serving(served(scorers)) as url:
        answer = requests.post(
            f"{url}/score", json={"rows": [row], "tokenizer": tokenizer}, timeout=30
        ).json()
    mean = sum(alone) / 3
    assert answer["scores"] == pytest.approx([mean], abs=1e-5)
    assert answer["spread"] == pytest.approx([(sum((s - mean) ** 2 for s in alone) / 3) ** 0.5], abs=1e-5)


def test_info_names_the_members_and_what_combines_them(tmp_path, engine):
    scorers = members(tmp_path, engine, None)
    info = served(scorers, combine="min").info
    assert (info["name"], info["combine"], info["centre"]) == ("min of rm0, rm1, rm2", "min", 0.5)
    assert [member["name"] for member in info["members"]] == ["rm0", "rm1", "rm2"]
    single = ServedModel({"rm1": scorers[1]}, LIMITS).info
    assert info["members"][1]["model"] == single["model"] and "members" not in single


def test_the_id_covers_every_member_and_the_combination(tmp_path, engine):
    scorers = members(tmp_path, engine, None)
    ids = {
        served(scorers, combine="min").info["model"],
        served(scorers, combine="mean").info["model"],
        served(scorers[:2], combine="min").info["model"],
        served(scorers, combine="mean_minus_std").info["model"],
        served(scorers, combine="mean_minus_std", coef=2.0).info["model"],
    }
    again = served(scorers, combine="min").info["model"]
    assert len(ids) == 5 and again in ids
    with torch.no_grad():
        scorers[2].model.head.bias += 1e-3
    assert served(scorers, combine="min").info["model"] not in ids


def test_members_of_two_tokenizers_refuse_token_ids(tmp_path, engine):
    scorers = members(tmp_path, engine, None, shared=False)
    tokenizer = ServedModel({"rm0": scorers[0]}, LIMITS).info["tokenizer"]
    row = {"query_ids": [40, 41], "response_ids": [90, 10]}
    with serving(served(scorers)) as url:
        assert requests.get(f"{url}/info", timeout=30).json()["tokenizer"] != tokenizer
        answer = requests.post(f"{url}/score", json={"rows": [row], "tokenizer": tokenizer}, timeout=30)
    assert answer.status_code == 409 and "rows[0]: token ids of another vocabulary" in answer.json()["detail"]


def test_members_that_read_no_common_prompt_are_refused(tmp_path, engine):
    scorers = members(tmp_path, engine, None)
    scorers[0].model.config.chat_template, scorers[1].model.config.chat_template = True, False
    with pytest.raises(ConfigError, match="MODEL: some members were trained on conversations"):
        served(scorers)


def test_an_ensemble_is_not_the_model_of_one_folder(tmp_path, engine, policy):
    expected = f"reward.server.expected_path={tmp_path / 'rm0'}"
    with serving(served(members(tmp_path, engine, None))) as url:
        with pytest.raises(
            ConfigError, match="expected_path names one model, and the server has an ensemble"
        ):
            remote(url, engine, policy, expected)
