"""Calibration samples: sources, encoding, batches."""
