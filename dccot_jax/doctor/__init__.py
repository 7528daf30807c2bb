"""What a run would find: every host's devices and versions, collectives that work, a workdir that all hosts share."""
