"""From a recipe's `reward` section to what scores the rollouts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from online_runs import forget_precision
from reward_model_folders import save_reward_model
from tiny_models import tiny_model
from tiny_tokenizers import single_bytes

from drpo.config import ConfigError, load_recipe
from drpo.data.records import Record
from drpo.engine import Engine, EngineConfig
from drpo.reward_functions import identities_of, score_in_detail
from drpo.rewards import Completion
from drpo.trainers.online_recipe import OnlineRecipe, RewardConfig
from reward_models.export import export_classifier
from reward_models.model import RewardModel
from reward_models.score import RewardModelScorer
from reward_models.sources import reward_from

ROWS = [([40, 41, 42], [90, 91, 92, 0]), ([50] * 9, [100, 0]), ([60, 61], [110, 111, 112])]
COMPLETIONS = [
    Completion("ab", " xyz", ids[-1] == 0, list(query), list(ids), Record("ab", completion=" x"))
    for query, ids in ROWS
]


@pytest.fixture
def engine(tmp_path):
    forget_precision()
    yield Engine(EngineConfig(mixed_precision="no", trackers=[]), tmp_path, 0, None)
    forget_precision()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three reward models that differ in their heads, in zero and in unit; the policy's tokenizer is theirs."""
    folder = tmp_path_factory.mktemp("models")
    for index, (centre, scale) in enumerate([(0.5, 2.0), (-1.0, 0.5), (0.25, 4.0)]):
        model = save_reward_model(folder / f"rm{index}", single_bytes())
        rescale(model, centre, scale, factor=1.0 - index)
        model.save_pretrained(folder / f"rm{index}")
    single_bytes().save_pretrained(folder / "policy")
    return folder


def rescale(model: RewardModel, centre: float, scale: float, factor: float) -> None:
    model.config.centre, model.config.scale = centre, scale
    with torch.no_grad():
        model.head.weight.mul_(factor)


def reward_of(folder: Path, engine: Engine, section: dict, *overrides: str):
    """The reward of a recipe file with this section; paths there are within `folder`."""
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump({"reward": section}))
    recipe = load_recipe(OnlineRecipe, recipe_file, overrides)
    return reward_from(recipe.reward, engine, str(folder / "policy"))


def paths(folder: Path, *indices: int) -> list[str]:
    return [str(folder / f"rm{index}") for index in indices]


def scores(reward) -> list[float]:
    return score_in_detail(reward, COMPLETIONS).scores.tolist()


# --- ensembles --------------------------------------------------------------------------------------------


def test_an_ensemble_of_one_scores_as_the_model_bit_for_bit(folder, engine):
    alone = reward_of(folder, engine, {"path": paths(folder, 0)[0]})
    for ensemble in ({"combine": "mean"}, {"combine": "min"}, {"combine": "mean_minus_std", "coef": 3.0}):
        joint = reward_of(folder, engine, {"ensemble": {"paths": paths(folder, 0), **ensemble}})
        assert scores(joint) == scores(alone)
        assert joint.max_tokens == alone.max_tokens


def test_members_score_with_their_own_zero_and_unit(folder, engine):
    """Member 1 has a head of zeros but for the bias, b: its score is (b + 1) / 0.5 whatever it reads."""
    reward = reward_of(folder, engine, {"ensemble": {"paths": paths(folder, 0, 1, 2), "combine": "min"}})
    alone = [scores(reward_of(folder, engine, {"path": path})) for path in paths(folder, 0, 1, 2)]
    detailed = score_in_detail(reward, COMPLETIONS)
    for index in range(3):
        assert detailed.details[f"member_{index}"].tolist() == alone[index]
    assert detailed.scores.tolist() == [min(column) for column in zip(*alone, strict=True)]
    bias = RewardModel.from_pretrained(folder / "rm1").head.bias.item()
    assert alone[1] == pytest.approx([(bias + 1.0) / 0.5] * 3)
    spreads = [
        math.sqrt(sum((s - sum(column) / 3) ** 2 for s in column) / 3) for column in zip(*alone, strict=True)
    ]
    assert detailed.details["spread"].tolist() == pytest.approx(spreads, rel=1e-5)


@pytest.mark.parametrize(
    "config, combine, message",
    [
        (
            {"scale": 1.0},
            "mean",
            "reward.ensemble.paths: .*rm0' was given a scale .*other' was not.*unit_variance",
        ),
        (
            {"centre": 0.0},
            "mean",
            "reward.ensemble.paths: .*rm0' was given a centre .*other' was not.*num_ref",
        ),
    ],
)
def test_members_in_different_units_are_refused(folder, engine, tmp_path, config, combine, message):
    model = save_reward_model(tmp_path / "other", single_bytes())
    model.config.scale = 2.0
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "other")
    section = {"ensemble": {"paths": [*paths(folder, 0), str(tmp_path / "other")], "combine": combine}}
    with pytest.raises(ConfigError, match=message):
        reward_of(folder, engine, section)


def test_the_lowest_score_of_models_without_a_zero_is_refused(folder, engine, tmp_path):
    for name in ("a", "b"):
        model = save_reward_model(tmp_path / name, single_bytes())
        model.config.centre = 0.0
        model.save_pretrained(tmp_path / name)
    members = [str(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="reward.ensemble.paths: .*combine=min compares constants"):
        reward_of(folder, engine, {"ensemble": {"paths": members, "combine": "min"}})
    reward_of(folder, engine, {"ensemble": {"paths": members}})


def test_exported_members_keep_zero_and_unit(folder, engine, tmp_path):
    export_classifier(paths(folder, 0)[0], tmp_path / "exported")
    members = [str(tmp_path / "exported"), *paths(folder, 2)]
    reward = reward_of(folder, engine, {"ensemble": {"paths": members, "combine": "min"}})
    original = reward_of(folder, engine, {"ensemble": {"paths": paths(folder, 0, 2), "combine": "min"}})
    assert scores(reward) == pytest.approx(scores(original), abs=2e-5)


def test_a_part_is_identified_by_the_contents_of_its_recipe(folder, engine, tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(
        "def made(path):\n    return lambda completions: [1.0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = tmp_path / "settings.txt"
    part = {"name": "mine", "function": "own_parts:made", "recipe": str(settings)}
    found = []
    for text in ("1", "2", "1"):
        settings.write_text(text)
        reward = reward_of(folder, engine, {"parts": [part, {"name": "length", "length": "tokens"}]})
        found.append(identities_of(reward, "reward.parts"))
    assert found[0] == found[2] != found[1]
    assert [list(identities) for identities in found] == [["reward.parts/mine"]] * 3
    settings.unlink()
    assert identities_of(reward_of(folder, engine, {"parts": [part]}), "reward.parts") == {}


def test_members_hold_equal_frozen_weights_once(folder, engine):
    reward = reward_of(folder, engine, {"ensemble": {"paths": paths(folder, 0, 2)}})
    before = scores(reward)
    reward.share_weights(tiny_model("llama", vocab_size=300), None)
    first, second = (scorer.model for scorer in reward.scorers())
    shared = [
        a.data_ptr() == b.data_ptr()
        for a, b in zip(first.backbone.parameters(), second.backbone.parameters(), strict=True)
    ]
    assert all(shared) and first.head.weight.data_ptr() != second.head.weight.data_ptr()
    assert scores(reward) == before


# --- parts ------------------------------------------------------------------------------------------------


def test_a_sum_of_every_kind_of_part(folder, engine, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "def halves(completions): return [0.5] * len(completions)\n"
        "def made(path): return lambda completions: [float(open(path).read())] * len(completions)\n"
    )
    (tmp_path / "settings.txt").write_text("7")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = [
        {"name": "rm", "path": paths(folder, 0)[0], "weight": 2.0},
        {"name": "both", "ensemble": {"paths": paths(folder, 1, 2)}, "weight": 0.0},
        {"name": "halves", "function": "my_parts:halves", "weight": 10.0},
        {"name": "made", "function": "my_parts:made", "recipe": str(tmp_path / "settings.txt")},
        {"name": "tokens", "length": "tokens", "weight": -0.1},
        {"name": "relative", "length": "relative", "weight": 0.0},
        {"name": "letters", "format": "[a-z]+", "weight": 100.0},
    ]
    detailed = score_in_detail(reward_of(folder, engine, {"parts": parts}), COMPLETIONS)
    rm = scores(reward_of(folder, engine, {"path": paths(folder, 0)[0]}))
    expected = [2 * s + 5 + 7 - 0.1 * len(ids) + 100 for s, (_, ids) in zip(rm, ROWS, strict=True)]
    assert detailed.scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert detailed.details["rm"].tolist() == rm
    assert detailed.details["relative"].tolist() == [2.0] * 3
    assert detailed.details["tokens"].tolist() == [4.0, 2.0, 3.0]
    names = ["rm", "both", "both/spread", "both/member_0", "both/member_1"]
    assert list(detailed.details) == [*names, "halves", "made", "tokens", "relative", "letters"]


def test_one_part_of_weight_1_is_the_source_itself_bit_for_bit(folder, engine):
    path = paths(folder, 0)[0]
    joint = reward_of(folder, engine, {"parts": [{"name": "rm", "path": path}]})
    assert scores(joint) == scores(reward_of(folder, engine, {"path": path}))


@pytest.mark.parametrize(
    "section, message",
    [
        ({"parts": [{"path": "x"}]}, r"reward.parts\[0\].name must be letters"),
        ({"parts": [{"name": "a b", "path": "x"}]}, r"reward.parts\[0\].name must be .* got 'a b'"),
        ({"parts": [{"name": "a"}]}, r"reward.parts\[0\].name \(a\) needs one source of scores"),
        (
            {"parts": [{"name": "a", "path": "x", "length": "tokens"}]},
            r"reward.parts\[0\].path cannot be given together with reward.parts\[0\].length",
        ),
        (
            {"parts": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]},
            r"reward.parts\[1\].name is that of reward.parts\[0\] too \(a\)",
        ),
        (
            {"parts": [{"name": "a", "format": "(", "weight": 1}]},
            r"reward.parts\[0\].format is not a regular",
        ),
        (
            {"parts": [{"name": "a", "path": "x", "recipe": "y"}]},
            r"parts\[0\].recipe is for reward.parts\[0\].f",
        ),
        ({"parts": [{"name": "a", "length": "words"}]}, r"reward.parts\[0\].length"),
        ({"parts": [{"name": "a", "ensemble": {}}]}, r"reward.parts\[0\].ensemble.paths must name"),
        ({"parts": [{"name": "a", "weigth": 1}]}, r"reward.parts\[0\].*weigth"),
        (
            {"parts": [{"name": "a", "length": "tokens"}], "dtype": "bfloat16"},
            "reward.dtype is for a reward model",
        ),
        (
            {"parts": [{"name": "a", "path": "x"}], "path": "y"},
            "reward.path cannot be given together with .*parts",
        ),
        ({"ensemble": {"paths": []}}, "reward.ensemble.paths must name"),
        ({"ensemble": {"paths": ["x", "y", "x"]}}, "reward.ensemble.paths names a reward model twice.*'x'"),
        ({"ensemble": {"paths": ["x"], "coef": 2}}, "reward.ensemble.coef does not apply to .*combine=mean"),
        ({"ensemble": {"paths": ["x"], "combine": "median"}}, "reward.ensemble.combine"),
        ({"ensemble": {"paths": ["x"]}, "function": "a:b"}, "reward.ensemble cannot be given together with"),
    ],
)
def test_a_section_that_cannot_work_is_refused_with_its_key(folder, engine, section, message):
    with pytest.raises(ConfigError, match=message):
        reward_of(folder, engine, section)


def test_an_identity_of_none_is_as_none_and_one_that_cannot_be_compared_is_refused(
    folder, engine, tmp_path, monkeypatch
):
    (tmp_path / "with_identity.py").write_text(
        "class Scores:\n"
        "    def __init__(self, identity):\n"
        "        self.identity = identity\n"
        "    def __call__(self, completions):\n"
        "        return [1.0 for _ in completions]\n"
        "unknown, number, nested = Scores(None), Scores(3), Scores({'a': 3})\n"
        "def made(path):\n"
        "    return unknown\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "settings.txt").write_text("1")
    part = {"name": "a", "function": "with_identity:made", "recipe": str(tmp_path / "settings.txt")}
    found = identities_of(reward_of(folder, engine, {"parts": [part]}), "reward.parts")
    assert found["reward.parts/a"].startswith("a function with the settings ")
    reward_of(folder, engine, {"function": "with_identity:unknown"})
    for name in ("number", "nested"):
        spec = f"with_identity:{name}"
        for section, place in (
            ({"parts": [{"name": "a", "function": spec}]}, "reward.parts[0].function"),
            ({"function": spec}, "reward.function"),
        ):
            with pytest.raises(ConfigError, match=re.escape(f"{place}='{spec}': the attribute `identity`")):
                reward_of(folder, engine, section)


@pytest.mark.parametrize(
    "part, message",
    [
        ({"path": "./none"}, r"reward.parts\[0\].path: no folder './none'"),
        ({"ensemble": {"paths": ["./none"]}}, r"reward.parts\[0\].ensemble.paths\[0\]: no folder './none'"),
        ({"function": "no_module:f"}, r"reward.parts\[0\].function='no_module:f'"),
        (
            {"function": "math:sqrt", "recipe": "x"},
            r"reward.parts\[0\].function='math:sqrt' cannot be called with reward.parts\[0\].recipe alone",
        ),
        ({"function": "builtins:str", "recipe": "x"}, "returned 'x' for .*recipe, which scores nothing"),
    ],
)
def test_a_part_that_cannot_be_loaded_is_named(folder, engine, part, message):
    with pytest.raises(ConfigError, match=message):
        reward_of(folder, engine, {"parts": [{"name": "a", **part}]})


def test_a_part_that_fails_is_named(folder, engine):
    reward = reward_of(folder, engine, {"parts": [{"name": "a", "function": "builtins:int"}]})
    with pytest.raises(
        ConfigError, match=re.escape("reward.parts[0].function='builtins:int' does not score")
    ):
        reward(COMPLETIONS)


def test_parts_and_ensembles_can_be_given_on_the_command_line():
    overrides = ["reward.ensemble.paths=[a,b]", "reward.ensemble.combine=mean_minus_variance"]
    section = load_recipe(OnlineRecipe, None, overrides).reward
    assert section.ensemble.paths == ["a", "b"] and section.models == {
        "ensemble.paths[0]": "a",
        "ensemble.paths[1]": "b",
    }


def test_models_of_parts_are_listed_by_key():
    parts = [
        {"name": "a", "length": "tokens"},
        {"name": "b", "path": "x"},
        {"name": "c", "ensemble": {"paths": ["y"]}},
    ]
    assert RewardConfig(parts=parts).models == {"parts[1].path": "x", "parts[2].ensemble.paths[0]": "y"}
    assert RewardConfig(path="z").models == {"path": "z"}
    assert RewardConfig().kind is None and RewardConfig(parts=parts).kind == "parts"


def test_settings_of_loading_hold_for_all_models(folder, engine):
    section = {"ensemble": {"paths": paths(folder, 0, 2)}, "batch_size": 2, "offload": True}
    scorers = reward_of(folder, engine, section).scorers()
    assert all(isinstance(scorer, RewardModelScorer) for scorer in scorers) and len(scorers) == 2
    assert [(scorer.batch_size, scorer.offloaded) for scorer in scorers] == [(2, True)] * 2
