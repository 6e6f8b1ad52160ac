"""Backends: who measures. `protocol.py` says what each takes and gives."""
