"""The version, for whoever notes it in a file."""

__version__ = "0.1.0"
