"""Number formats: one file each, one row each in `table`."""
