"""Evaluation: one protocol for every arm, metrics per task, and the statistics that compare arms."""
