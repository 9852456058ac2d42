"""Comparisons of several models over seeds, as `reproduce.py` runs them.

Here belong the presets that say what is compared, the runner that calls the scripts, and the
tables, plots and records made of finished runs; training and evaluation themselves do not.
"""
