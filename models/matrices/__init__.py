"""Matrices: how weights are stored and multiplied, and which product is used."""
