"""Rollouts: resets, sampling and the resulting trajectories."""
