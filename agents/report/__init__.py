"""Pages of what runs and benchmarks have measured: `run` and `benchmark` collect it, `templates/` shows it."""
