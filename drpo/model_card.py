"""The README.md of a saved model: the recipe, the data, and the last metrics, so that the folder explains itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from drpo.config import git_commit, package_versions
from drpo.metrics import read_metrics, reproducible


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
