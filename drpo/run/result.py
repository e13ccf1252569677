"""The result of a run: models as plain `from_pretrained` folders with a model card as README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from drpo.config import resolved_yaml
from drpo.models.export import save_policy
from drpo.run.folder import RunFolder
from drpo.run.metrics import read_metrics, reproducible
from drpo.versions import git_commit, package_versions


@dataclass(frozen=True)
class Result:
    """Writer of a run's model: `<run_dir>/<name>` at the end, `<run_dir>/<name>_step_<n>` on request before."""

    run: RunFolder
    trained: nn.Module
    "The prepared module that `model` is a part of."
    model: Any
    tokenizer: Any
    data_report: str
    name: str
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    "Further models that are parts of `trained`, by name, written at the end alone."

    def at_step(self, step: int) -> None:
        """Write the current model, if `checkpoint.model_every` asks for it at this step."""
        every = self.run.recipe.checkpoint.model_every
        if every and step % every == 0:
            self._write(self.model, f"{self.name}_step_{step}")

    def finish(self) -> Path:
        """Write the models, close the run, and return the folder of the first."""
        folder = self._write(self.model, self.name)
        for name, model in self.others.items():
            self._write(model, name)
        self.run.close()
        return folder

    def _write(self, model: nn.Module, name: str) -> Path:
        folder = self.run.path / name
        engine = self.run.engine
        with engine.whole_weights(self.trained):
            if engine.is_main:
                card = model_card(self.run.recipe, self.data_report, self.run.metrics.path)
                save_policy(model, self.tokenizer, folder, card)
        engine.barrier()
        return folder


def model_card(recipe: Any, data_report: str, metrics_path: Path) -> str:
    """Return the Markdown text of the model card."""
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
{resolved_yaml(recipe).strip()}
```
"""
