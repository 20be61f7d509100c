"""The engine: the run, loading, sampling, results and conversations."""
