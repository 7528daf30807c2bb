"""Training: the loss, the optimizer, one step, checkpoints and the loop (stage `train`)."""
