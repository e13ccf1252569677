"""The embedded demo, whole: what `make demo` runs, and a launch script without a recipe."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_runs import ROOT, finished, metrics_of, plain, run


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_makes_what_it_lacks_and_resets_raise_the_true_reward(tmp_path):
    out = run(
        plain("drpo"), cwd=tmp_path, timeout=1200
    )  # no recipe: SFT policy and reward model are made first
    assert "runs/demo/sft/policy is missing: making it" in out
    assert "runs/demo/reward_model/reward_model is missing: making it" in out
    assert out.splitlines()[-1] == str(tmp_path / "runs/demo/drpo/policy")

    out = run([sys.executable, str(ROOT / "launch" / "demo.py")], cwd=tmp_path, timeout=1200)
    for word in (
        "SFT",
        "PPO",
        "DR-PO",
        "true reward",
        "incomplete",
        "no_stop",
        "runs/demo/curves.png",
        "LC win rate",
    ):
        assert word in out, word
    assert (tmp_path / "runs/demo/curves.png").stat().st_size > 5000
    compared = json.loads((tmp_path / "runs/demo/compare/comparison.json").read_text())
    wins = {system["name"]: system["values"]["win_rate"] for system in compared["systems"]}
    assert wins["DR-PO"]["low"] > max(wins["PPO"]["high"], wins["SFT"]["high"]), (
        "a tie is the best there is: 50%"
    )
    assert (tmp_path / "runs/demo/compare/report.html").stat().st_size > 100_000

    last = {name: metrics_of(tmp_path / "runs/demo" / name)[-1] for name in ("ppo", "drpo")}
    sft = metrics_of(tmp_path / "runs/demo/drpo")[0]
    assert last["drpo"]["eval/true_reward"] > sft["eval/true_reward"] + 2
    assert last["drpo"]["eval/true_reward"] > last["ppo"]["eval/true_reward"] + 2


def test_the_real_demo_says_what_data_it_needs_before_anything_is_trained(tmp_path):
    done = finished(plain("demo_real"), "none.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "no file or folder none.jsonl" in done.stderr
    assert "make demo-real DATA=path/to/axis.jsonl" in done.stderr
    assert list(tmp_path.iterdir()) == []
