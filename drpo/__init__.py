"""DR-PO and its baselines: online RLHF on accelerate, with rollouts that may start in a dataset response."""
