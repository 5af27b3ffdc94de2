"""Training: training loop, optimizers, checkpoints of a run."""
