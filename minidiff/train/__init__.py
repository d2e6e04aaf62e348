"""Trains the checkpoints that ship, from pictures to weights, with minidiff's own models. See `stages.py`."""
