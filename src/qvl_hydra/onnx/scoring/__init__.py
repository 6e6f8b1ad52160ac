"""Scoring: graphs whose operators are quantized behind a switch, of this project and of others."""
