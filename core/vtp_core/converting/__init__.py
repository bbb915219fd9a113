"""Weights of other code bases to a directory that loads as a run: ``vtp convert``."""
