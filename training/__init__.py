"""The parts of a training run: flags, checkpoints, record, watch, and shares of a batch.

train.py puts them together.
"""
