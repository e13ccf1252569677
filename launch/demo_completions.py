"""Completions of the demo task that need no model: what its writers wrote, and the labelled pairs of the annotator."""

from __future__ import annotations

from pathlib import Path

from drpo.data.demo import DemoConfig, make_demo
from eval.completions import CompletionRow, CompletionsWriter, prompt_id_of

DEMO_COMPLETIONS = Path("runs/demo/completions/texts.jsonl")
NUM_POSTS = 256


def make_demo_completions(*needed: str) -> None:
    """Write DEMO_COMPLETIONS if it is among `needed` and is not there."""
    if str(DEMO_COMPLETIONS) not in needed or DEMO_COMPLETIONS.exists():
        return
    print(f"{DEMO_COMPLETIONS} is missing: writing it", flush=True)
    config = DemoConfig(num_eval=NUM_POSTS)
    by_writers = make_demo(config, "demonstrations", "eval")
    by_annotator = make_demo(config, "prompts", "eval")
    rows = []
    for written, pair in zip(by_writers, by_annotator, strict=True):
        texts = {"writers": written.completion, "chosen": pair.chosen, "rejected": pair.rejected}
        for system, text in texts.items():
            prompt_id = prompt_id_of(pair.prompt)
            rows.append(CompletionRow(system, prompt_id, pair.prompt, text, True, None, 0, pair.completion))
    CompletionsWriter(DEMO_COMPLETIONS, {"data": "demo", "seed": config.seed}).write(rows)
