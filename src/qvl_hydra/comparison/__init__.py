"""Comparison: how well rankings agree, how many samples they need, and whether one model answers for another."""
