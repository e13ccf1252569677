"""A small comparison, made by hand, for the tests of its report: every kind of example occurs, and is counted here.

id        system         score  orders        verdicts             else
one       DR-PO beta 1   1      consistent    ok, ok               5 characters forced, longest response
two       DR-PO beta 1   0.5    inconsistent  ok, ok
three     DR-PO beta 1   null   null          ok, refused
four      DR-PO beta 0.5 0.75   inconsistent  ok, ok (one a tie)
five      PPO            0      consistent    ok, ok
six       PPO            null   null          malformed, failed    cut
seven     PPO            0.25   inconsistent  ok, ok               suspected attack of a
eight     PPO            0.5    consistent    ok, ok               suspected attack of b
"""

from __future__ import annotations

import copy
from typing import Any

MEASURES = [
    (
        "win_rate",
        "win rate",
        "%",
        1,
        "high",
        "Share of comparisons won against the reference; a tie is half.",
    ),
    ("lc_win_rate", "LC win rate", "%", 1, "high", "The win rate that responses of equal length would have."),
    ("true_reward", "true reward", "", 2, "high", "Mean of the task's own reward."),
    ("kl", "KL", "nats", 2, None, "Mean KL of a whole response to the reference policy."),
    ("num_tokens", "length", "tokens", 1, None, "Mean tokens of a response, stop token included."),
]


def estimate(value: float | None, low: float | None = None, high: float | None = None, runs=()) -> dict:
    return {"value": value, "low": low, "high": high, "runs": list(runs), "method": "wilson_effective"}


def limits(whole: dict) -> dict:
    return {key: whole[key] for key in ("value", "low", "high")}


def system(name: str, method: str, setting: float | None, values: dict, **changes) -> dict[str, Any]:
    judged = {"wins": 2, "ties": 1, "losses": 0, "undecided": 1, "worst_case": 0.625, "best_case": 0.875}
    judged |= {"consistent": 0.9, "consistent_low": 0.8, "consistent_high": 0.95}
    judged |= {"first_slot_wins": 0.52, "first_slot_p": 0.31}
    judged["statuses"] = {"ok": 7, "refused": 1, "malformed": 0, "truncated": 0, "failed": 0}
    row = {"name": name, "method": method, "setting": setting, "policies": [f"runs/{name}"], "num_runs": 1}
    row |= {"num_prompts": 256, "values": {key: None for key, *_ in MEASURES} | values, "judged": judged}
    return row | {"warnings": []} | changes


def verdict(order: str, status: str, winner: str | None, text: str | None = None, detail: str = "") -> dict:
    return {"order": order, "status": status, "winner": winner, "text": text, "detail": detail}


def example(
    name: str, system: str, score: float | None, consistent: bool | None, verdicts, **changes
) -> dict:
    row = {
        "id": name,
        "prompt_id": f"prompt-{name}",
        "prompt": f"Prompt of {name}.",
        "system": system,
        "run": 0,
    }
    row |= {"baseline": "reference", "response_a": f"Answer {name}.", "response_b": f"Reference {name}."}
    row |= {"ended_a": True, "ended_b": True, "prefix_a": 0, "score": score, "consistent": consistent}
    row |= {"verdicts": list(verdicts), "suspicions_a": [], "suspicions_b": [], "values": {}}
    return row | changes


def examples() -> list[dict]:
    both = [verdict("ab", "ok", "a", "Response A is complete.\nPreferred: A"), verdict("ba", "ok", "a")]
    flip = [verdict("ab", "ok", "a"), verdict("ba", "ok", "b")]
    half = [verdict("ab", "ok", "a"), verdict("ba", "ok", "tie")]
    lost = [verdict("ab", "ok", "b"), verdict("ba", "ok", "b")]
    refused = [verdict("ab", "ok", "a"), verdict("ba", "refused", None, "I cannot help.", "content filter")]
    broken = [
        verdict("ab", "malformed", None, "both are fine"),
        verdict("ba", "failed", None, None, "timeout"),
    ]
    one, half_one = "DR-PO beta 1", "DR-PO beta 0.5"
    return [
        example(
            *("one", one, 1.0, True, both),
            response_a="😀 abc, and then what the policy wrote itself, at length.",
            prefix_a=5,
            values={"true_reward": 4.0, "kl": 1.25},
        ),
        example("two", one, 0.5, False, flip, values={"true_reward": -1.5, "kl": 2.0}),
        example("three", one, None, None, refused, values={"true_reward": None}),
        example("four", half_one, 0.75, False, half, values={"true_reward": 0.25}),
        example("five", "PPO", 0.0, True, lost, values={"true_reward": 3.0}),
        example("six", "PPO", None, None, broken, ended_a=False),
        example("seven", "PPO", 0.25, False, lost, suspicions_a=["asks the judge to prefer it"]),
        example("eight", "PPO", 0.5, True, half, suspicions_b=["closes the section"]),
    ]


def comparison(**changes: Any) -> dict[str, Any]:
    """The whole of it; `changes` replace fields at the top."""
    best = {
        "win_rate": estimate(0.702, 0.661, 0.74, [0.69, 0.702, 0.714]),
        "lc_win_rate": estimate(0.68, 0.63, 0.725),
        "true_reward": estimate(1.975, 1.8, 2.15, [1.9, 1.95, 2.075]),
        "kl": estimate(8.4, 8.0, 8.8),
        "num_tokens": estimate(31.25),
    }
    middle = {
        "win_rate": estimate(0.6, 0.55, 0.65),
        "true_reward": estimate(0.5, 0.3, 0.7),
        "kl": estimate(5.5),
    }
    worst = {
        "win_rate": estimate(0.41, 0.36, 0.46),
        "true_reward": estimate(-0.25, -0.4, -0.1),
        "kl": estimate(6.0, 5.5, 6.5),
        "num_tokens": estimate(24.0, 22.0, 26.0),
    }
    systems = [
        system("DR-PO beta 1", "DR-PO", 1.0, best, num_runs=3),
        system("DR-PO beta 0.5", "DR-PO", 0.5, middle),
        system(
            "PPO", "PPO", None, worst, warnings=["2% of the responses hold a suspected attack"], judged=None
        ),
    ]
    names = [row["name"] for row in systems]
    points = [
        {"system": row["name"], "method": row["method"], "on_front": front}
        | {"kl": limits(row["values"]["kl"]), "reward": limits(row["values"]["true_reward"])}
        for row, front in zip(systems, (True, True, False), strict=True)
    ]
    keys = ("key", "name", "unit", "digits", "better", "help")
    whole = {
        "title": "demo: 3 systems against reference",
        "task": "demo",
        "baseline": "reference",
        "created": "2026-11-21T09:00:00+00:00",
        "commit": "abc1234",
        "versions": {"drpo": "0.1.0", "torch": "2.13.0"},
        "judge": {
            **{"kind": "openai", "name": "judge-1", "prompt": "tldr-1", "orders": "both", "ties": True},
            "spent": {"calls": 1536, "prompt_tokens": 812345, "cost": 1.234},
        },
        "measures": [dict(zip(keys, measure, strict=True)) for measure in MEASURES],
        "systems": systems,
        "tests": [
            paired_test("win_rate", names[0], names[2], 0.292, 0.23, 0.35, 0.0001, 0.0004),
            paired_test("win_rate", names[0], names[1], 0.05, -0.01, 0.11, 0.1, 0.2),
            paired_test("true_reward", names[2], names[1], -0.75, -1.0, -0.5, 0.001, 0.003),
            paired_test("win_rate", names[1], names[2], 0.04, 0.001, 0.08, 0.04, 0.12),
            paired_test("kl", names[0], names[2], 2.4, 2.0, 2.8, 0.0001, 0.0004),
        ],
        "matches": [
            {
                **{"system_1": names[0], "system_2": names[1], "value": 0.55, "low": 0.5, "high": 0.6},
                **{"wins": 140, "ties": 2, "losses": 113, "undecided": 1, "num_prompts": 255},
            }
        ],
        "ranking": {
            "systems": [
                {"name": names[0], "elo": 1148.7, "low": 1116.0, "high": 1181.6},
                {"name": "reference", "elo": 1000.0, "low": None, "high": None},
            ],
            **{"anchor": "reference", "num_comparisons": 768, "warnings": ["PPO never met DR-PO"]},
        },
        "frontiers": [{"reward": "true_reward", "points": points}],
        "curves": [
            {
                "setting": "beta",
                "measure": "win_rate",
                "points": [
                    {
                        "system": names[1],
                        "method": "DR-PO",
                        "setting": 0.5,
                        "value": 0.6,
                        "low": 0.55,
                        "high": 0.65,
                    },
                    {
                        "system": names[0],
                        "method": "DR-PO",
                        "setting": 1.0,
                        "value": 0.702,
                        "low": 0.661,
                        "high": 0.74,
                    },
                ],
            }
        ],
        "examples": examples(),
        "rollouts": [
            {
                **{"system": "DR-PO beta 1", "step": 40, "prompt": "Post: milk, eggs", "prefix": " milk,"},
                **{"continuation": " eggs", "ended": True, "scores": {"score": 1.2}},
            }
        ],
        "configs": {"compare": "task: demo\nsystems: 3\n", "DR-PO beta 1/0": "seed: 0\n"},
        "hashes": {"DR-PO beta 1/0": {"weights_sha256": "ab" * 32, "data_sha256": "cd" * 32}},
    }
    return copy.deepcopy(whole | changes)


def paired_test(measure: str, one: str, two: str, difference, low, high, p, p_holm) -> dict[str, Any]:
    row = {
        "measure": measure,
        "system_1": one,
        "system_2": two,
        "difference": difference,
        "low": low,
        "high": high,
    }
    return (
        row
        | {"p_value": p, "p_holm": p_holm, "num_prompts": 256, "detectable": 0.085}
        | {
            "over": "prompts",
            "reason": None if difference is not None else "nothing is decided",
        }
    )


def empty_comparison() -> dict[str, Any]:
    """One system, nothing measured, nothing judged, no list that holds anything."""
    nothing = {
        "judge": None,
        "tests": [],
        "matches": [],
        "ranking": None,
        "frontiers": [],
        "curves": [],
        "examples": [],
    }
    alone = system("SFT", "SFT", None, {}, judged=None, policies=[], num_prompts=0)
    return comparison(
        systems=[alone], commit=None, versions={}, rollouts=[], configs={}, hashes={}, **nothing
    )
