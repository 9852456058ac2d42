"""Measurements of speed and memory, in comparison with the style of the original code.

benchmark.py runs them.
"""
