"""Real rollouts by vLLM, in an interpreter that has it: DRPO_VLLM_PYTHON, or this one."""

from __future__ import annotations

import functools
import json

import pytest
import yaml
from online_runs import save_tiny_policy
from tiny_runs import ROOT
from vllm_checks import BUDGETS, OTHER_STOP, STOP, SUPPRESSED
from vllm_runs import ENVIRONMENT, assert_same, call, metrics_of, needs_vllm, recipe_file

pytestmark = needs_vllm


@functools.cache
def checks(*arguments: str) -> dict:
    return json.loads(call([str(ROOT / "tests/support/vllm_checks.py"), *arguments]).splitlines()[-1])


CASES = [("gpt_neox", "full", "no"), ("llama", "lora", "no")]
each = pytest.mark.parametrize("case", CASES, ids="-".join)


@each
def test_logprobs_are_the_trainers_after_two_updates_too(case):
    found = checks(*case)
    assert max(found["mean_differences"]) < 1e-5 and max(found["max_differences"]) < 1e-3
    assert found["stale_difference"] > 0.1, "the same check sees an engine that was not updated"


@each
def test_rows_end_at_stop_tokens_or_budgets_without_suppressed_ids(case):
    rows = checks(*case)["rows"]
    assert len(rows) == 3 * len(BUDGETS)
    for row, budget in zip(rows, 3 * BUDGETS, strict=True):
        ended = [token in (STOP, OTHER_STOP) for token in row]
        assert not any(ended[:-1]) and not set(row) & set(SUPPRESSED)
        assert len(row) == budget or (len(row) < budget and ended[-1])
    assert any(row and row[-1] in (STOP, OTHER_STOP) for row in rows)
    assert len({tuple(row) for row in rows}) > 10, "rows have random numbers of their own"


@each
def test_draws_decide_a_row_and_the_process_is_left_as_it_was(case):
    found = checks(*case)
    assert found["repeated"] and found["alone_equal"], "float32 on a CPU: rounding does not show"
    assert found["random_state_kept"]
    assert "context 0 has 160 tokens and may get 24 new ones" in found["too_long"]


@each
def test_prompts_that_do_not_fit_into_one_forward_wait(case):
    lengths = checks(*case)["lengths_of_many"]
    assert len(lengths) == 40 and set(lengths) <= {1, 2} and 2 in lengths


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(launcher arguments, name, **changes)`: the metrics of a whole run, without wall-clock keys."""
    folder = tmp_path_factory.mktemp("vllm")
    save_tiny_policy(folder / "policy", hidden_size=64)

    def start(launcher: list[str], name: str, environment: dict[str, str] = ENVIRONMENT, **changes):
        path = recipe_file(folder, name, {"enforce_eager": True}, **changes)
        call([*launcher, str(ROOT / "launch/drpo.py"), str(path)], environment)
        return metrics_of(folder / name)

    return start


@pytest.fixture(scope="module")
def alone(runs) -> list[dict[str, float]]:
    return runs([], "alone")


def test_a_run_of_resets_logs_how_the_engines_agree(alone):
    assert len(alone) == 4
    for row in alone[1:]:
        assert row["rollout/logprob_difference"] < 1e-5
        assert row["rollout/logprob_difference_max"] < 1e-3
        assert row["ppo/importance_weight"] == pytest.approx(1.0, abs=1e-4)
        assert row["ppo/importance_truncated"] == 0.0
        assert 0 < row["reset/share"] < 1
    assert alone[1]["ppo/policy_loss"] != alone[2]["ppo/policy_loss"]
    assert alone[2]["eval/kl"] > 0.1, "far from the start, and still the trainer's own rollouts"


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(alone, runs):
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert_same(runs(torchrun, "ddp"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_makes_the_run_of_one_process(alone, runs, tmp_path, stage):
    config = yaml.safe_load((ROOT / f"launch/accelerate/zero{stage}.yaml").read_text())
    path = tmp_path / "zero.yaml"
    path.write_text(yaml.safe_dump(config | {"num_processes": 2, "mixed_precision": "no"}))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(path)]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    assert_same(runs(launcher, f"zero{stage}", environment), alone)
