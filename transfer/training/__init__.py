"""Training: the loop, optimizers, checkpoints of a run."""
