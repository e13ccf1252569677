"""Measure what training changed in a policy's MLPs: each neuron's share of the shift along a probe direction.

    python launch/neuron_shift.py [recipe.yaml] [key=value ...]

One process, one device. Writes summary.md, summary.json, neurons.npz, probe.npz, layers.png, config.yaml to `run_dir`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # else launch/drpo.py would hide the package drpo
    sys.path[0] = str(HERE.parent)

from eval.neurons.analyse import NeuronShiftRecipe, neuron_shift
from launch.command_line import main


def inputs(recipe: NeuronShiftRecipe) -> list[str | None]:
    """List the models that the recipe names."""
    return [recipe.before, recipe.after]


if __name__ == "__main__":
    main(NeuronShiftRecipe, "demo/neuron_shift.yaml", neuron_shift, inputs, one_process=True)
