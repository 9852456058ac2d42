"""Captions and photos on their way to numbers: caption files, the tokenizer, word ids, decoding.

A reader for a new layout of captions or photos belongs here.
"""
