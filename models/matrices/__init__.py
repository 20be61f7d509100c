"""Matrices: storage and products of weights, and the choice of product."""
