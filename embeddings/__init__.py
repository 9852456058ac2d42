"""Embeddings that other models made, read from files and evaluated like a checkpoint's.

Nothing here knows models, data sets or vocabularies. Files, and which captions belong to which image, are
all that is needed.
"""
