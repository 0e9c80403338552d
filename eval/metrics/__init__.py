"""Metrics as plain functions: matrices of cells in, numbers out. Needs numpy, scipy and POT only."""
