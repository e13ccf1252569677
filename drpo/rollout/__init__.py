"""Rollouts: resets, sampling and the trajectories that come of them."""
