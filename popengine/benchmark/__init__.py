"""The benchmark: timed engines, shapes of random weights, tables."""
