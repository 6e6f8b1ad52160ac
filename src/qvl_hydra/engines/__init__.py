"""Engines: the backends that measure, behind one protocol and in one table."""
