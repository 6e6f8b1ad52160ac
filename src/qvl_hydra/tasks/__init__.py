"""Tasks: what the entry can do, each from settings to files in a run folder."""
