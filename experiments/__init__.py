"""Experiments: each file is one program, `python -m experiments.NAME --preset PRESET`."""
