"""The benchmark: timed engines, model shapes with random weights, tables."""
