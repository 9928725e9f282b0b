"""Pruning: metrics that score weights, rankings that turn scores into masks, and their use."""
