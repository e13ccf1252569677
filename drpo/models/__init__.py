"""Policies, critics and the one place where log-probabilities are computed."""
