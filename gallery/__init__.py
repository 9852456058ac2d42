"""A searchable collection of photos: its files, its index, its hub correction, its answers.

Its script is search.py.
"""
