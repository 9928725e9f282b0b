"""Calibration: batches from data sets, and statistics of the activations they cause."""
