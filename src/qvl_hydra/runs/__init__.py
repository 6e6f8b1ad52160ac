"""Runs: a run's folder, the record that is `run.json`, and how an interrupted run goes on."""
