"""The data stages without a run: a file of traces, a student's directory, and nothing else."""
