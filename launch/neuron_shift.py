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
from launch.command_line import main, one_process, say
from launch.demo_inputs import make_demo_inputs


def run(recipe: NeuronShiftRecipe) -> Path:
    """Train the demo's policies that are requested and missing, then compare them."""
    one_process("neuron_shift.py")
    make_demo_inputs(recipe.before, recipe.after)
    return neuron_shift(recipe, say)


if __name__ == "__main__":
    main(NeuronShiftRecipe, "demo/neuron_shift.yaml", run)
