"""The benchmark: suites, the matrix of runs, its measures and statistics."""
