"""Reward models: training, calibration, ensembles and serving them to the policy's trainer."""
