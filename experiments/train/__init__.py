"""Launchers that fit data: `python -m experiments.train.NAME`."""
