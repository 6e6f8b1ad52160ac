"""Scores: per-sample values as they are made, their store on disk, and the per-operator table."""
