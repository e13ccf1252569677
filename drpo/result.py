"""The result of a run: the model as a plain `from_pretrained` folder whose README.md says how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from drpo.config import git_commit, package_versions
from drpo.engine import Engine
from drpo.metrics import read_metrics, reproducible
from drpo.models.export import save_policy
from drpo.run_folder import RunFolder


def write_result(
    recipe: Any,
    engine: Engine,
    run: RunFolder,
    trained: nn.Module,
    model,
    tokenizer,
    data_report: str,
    name: str,
) -> Path:
    """Save `model`, a part of the prepared module `trained`, to `<run_dir>/<name>`, and close the run."""
    folder = run.path / name
    with engine.whole_weights(trained):
        if engine.is_main:
            save_policy(model, tokenizer, folder, model_card(recipe, data_report, run.metrics.path))
    engine.barrier()
    run.close()
    return folder


def model_card(recipe: Any, data_report: str, metrics_path: Path) -> str:
    """Markdown text of the card."""
    rows = read_metrics(metrics_path)
    last: dict[str, float] = {}
    for row in rows:  # the last value of every key: evaluation keys are not in every row
        last |= reproducible(row)
    table = "\n".join(f"| {key} | {value:.6g} |" for key, value in sorted(last.items()))
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    return f"""---
library_name: transformers
tags: [rlhf, drpo]
---
# {Path(recipe.run_dir).name}

Trained with DRPO (commit {git_commit()}; {versions}).

## Data
{data_report}

## Last metrics
| metric | value |
| --- | --- |
{table}

## Recipe
```yaml
{OmegaConf.to_yaml(OmegaConf.structured(recipe)).strip()}
```
"""
