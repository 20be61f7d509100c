"""Pruning methods by name, and what the calibrated ones know about a model."""
