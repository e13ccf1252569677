"""What online training did, from the files of its run folder: evaluations, resets, rollouts."""
