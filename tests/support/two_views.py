"""A script for two processes of one launch that see different folders, settings or data: what each of them is told.

torchrun --nproc_per_node 2 two_views.py <folder>    leaves <folder>/told_<rank>.json, {case: message or null}
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from drpo.config import ConfigError
from drpo.engine import Engine, EngineConfig
from drpo.rollout.sampler import Vocabulary
from drpo.rollout.vllm_requests import VLLMConfig
from drpo.rollout.vllm_servers import VLLMServers
from drpo.run import same_view
from drpo.run.folder import CheckpointConfig, LogConfig, Resume, RunFolder
from drpo.trainers.online_recipe import RewardConfig, RewardServerConfig
from drpo.trainers.preference.recipe import PreferenceRecipe, ReferenceConfig
from drpo.trainers.preference.reference_cache import is_cached
from eval.completions.sample import open_file
from reward_models.serving.client import remote_reward


@dataclass(frozen=True)
class Recipe:
    run_dir: str
    num_steps: int = 2
    resume: Resume = "auto"
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=1, keep=9))
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(trackers=[], timeout_minutes=7))


def main(root: Path) -> None:
    same_view.WAIT_SECONDS = 0.3  # a local disk is never late
    recipe = Recipe(run_dir=str(root / "shared"))
    engine = Engine(recipe.engine, root, 0, max_grad_norm=None)
    module = nn.Linear(1, 1)
    engine.prepare(module, torch.optim.AdamW(module.parameters()))
    mine = root / f"machine_{engine.rank}"
    told: dict[str, object] = {}

    def tell(case: str, check: Callable[[], object]) -> None:
        try:
            told[case] = check()
        except ConfigError as error:
            told[case] = str(error)

    def opened(folder: Path) -> int | None:
        run = RunFolder(replace(recipe, run_dir=str(folder)), engine)
        state = run.open()
        if state is None:
            for step in (1, 2):
                run.record(step, {"train/loss": 0.5}, ())
                run.save(step, recipe.num_steps, {})
        return state["step"] if state else None

    tell("shared, fresh", lambda: opened(root / "shared"))
    tell("shared, resumed", lambda: opened(root / "shared"))
    tell("own, fresh", lambda: opened(mine / "runs" / "x"))
    told["own, left"] = mine.exists()
    engine.barrier()
    for number in range(2) if engine.is_main else ():
        shutil.copytree(root / "shared", root / f"machine_{number}" / "runs" / "x")
    engine.barrier()
    if engine.rank == 1:  # as far as step 1 only
        shutil.rmtree(mine / "runs" / "x" / "checkpoints" / "step_2")
    engine.barrier()
    tell("own, resumed", lambda: opened(mine / "runs" / "x"))
    (root / "file").touch()
    tell("unwritable", lambda: opened(root / "file" / "x"))
    named = [replace(recipe, num_steps=2 + engine.rank)]
    tell("settings", lambda: RunFolder(named[0], engine))
    run = RunFolder(recipe, engine)
    tell("data", lambda: run.take_data(f"{100 + engine.rank} pairs", "digest"))
    tell("token ids", lambda: run.take_data("100 pairs", f"digest {engine.rank}"))

    def cached(folder: Path) -> bool:
        return is_cached(PreferenceRecipe(reference=ReferenceConfig(cache_dir=str(folder))), engine)

    (root / "cache").mkdir(exist_ok=True)
    (root / "cache" / "key.json").touch()
    tell("cache, shared", lambda: cached(root / "cache"))
    tell("cache, none", lambda: cached(root / "nowhere" / "cache"))
    if engine.is_main:
        shutil.copytree(root / "cache", mine / "cache")
    tell("cache, own", lambda: cached(mine / "cache"))
    tell("completions", lambda: len(open_file(engine, root / "completions.jsonl", {})[1]))
    tell("completions, own", lambda: open_file(engine, mine / "completions.jsonl", {}))
    nowhere = "http://127.0.0.1:9"
    tell("short wait", lambda: engine.check_wait(6.99, "reward.server"))
    reward = RewardConfig(url=nowhere, server=RewardServerConfig(timeout_minutes=6.0, request_seconds=60.0))
    tell("reward wait", lambda: remote_reward(reward, engine, "nowhere", False))
    vllm, vocabulary = VLLMConfig(urls=[nowhere], timeout_minutes=9.0), Vocabulary(2, (1,), ())
    tell("vllm wait", lambda: VLLMServers(vllm, engine, vocabulary, 4, 20))
    group = torch.distributed.distributed_c10d._get_default_group()
    told["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    told["left"] = sorted(path.name for path in root.rglob(".shared_*")) + [
        path.name for path in root.iterdir() if path.name == "nowhere"
    ]
    (root / f"told_{engine.rank}.json").write_text(json.dumps(told))
    engine.close()
    os._exit(0)  # all is written; how gloo's threads end with the interpreter is not the subject


if __name__ == "__main__":
    assert int(os.environ["WORLD_SIZE"]) == 2
    main(Path(sys.argv[1]))
