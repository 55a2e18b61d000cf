"""The command line, ``sparselora-fx``."""
