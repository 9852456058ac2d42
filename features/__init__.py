"""Feature arrays: made from photos by named networks, described, opened and checked.

A new encoder of photos belongs in encoders.py.
"""
