"""Building blocks of the encoders: GRU, pooling, cross attention, CNNs, shared batch norm.

A new layer is a new file here. It imports PyTorch and runtime/ only.
"""
