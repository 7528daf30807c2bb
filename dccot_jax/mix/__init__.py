"""From kept rows to a training plan: mixing, curriculum pacing, packing."""
