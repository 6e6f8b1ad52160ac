"""Reports: one self-contained HTML page for a sweep or a comparison, and the same figures as PNG."""
