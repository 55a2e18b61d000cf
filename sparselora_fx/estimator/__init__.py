"""Factors and statistics of frozen weights: how channels are predicted."""
