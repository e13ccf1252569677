"""Reward models: the model, its training, and its use as a reward function."""
