"""Estimators: how a score is measured or estimated over the walk; metrics of outputs, and probes."""
