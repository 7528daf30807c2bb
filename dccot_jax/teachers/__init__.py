"""Teachers: who writes traces, how requests are cached and metered, and the stage that collects traces."""
