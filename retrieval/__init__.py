"""What follows the model: similarities, ranks, metrics, hubness and its corrections.

Nothing here knows models or data sets, so all of it works on anybody's embeddings.
"""
