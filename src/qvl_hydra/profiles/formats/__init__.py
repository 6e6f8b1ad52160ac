"""Files that other tools read a profile from: one file a format, and the table of formats in `table.py`."""
