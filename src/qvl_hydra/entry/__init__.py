"""The entry, the only room that imports hydra: the config door, the command line, one job, the end of a multirun."""
