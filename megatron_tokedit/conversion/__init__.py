"""Hugging Face <-> Megatron weights: one small file a model family, streaming by tensor.

Invariant: values are moved, never computed with, so that a round trip gives the same bits.
"""
