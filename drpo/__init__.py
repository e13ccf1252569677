"""DR-PO and its baselines: online RLHF on accelerate, with rollouts that may start inside a dataset response."""
