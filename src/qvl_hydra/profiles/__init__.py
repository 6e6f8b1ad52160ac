"""Precision profiles: which operators stay in high precision, what that costs, and the files that other tools read."""
