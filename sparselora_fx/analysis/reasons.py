"""Reasons why linears stay dense that hold for one call, and perhaps not for the next."""

UNORDERED = "nothing shows that its rows are the batch's tokens in their order"
OTHER_GRID = "its tokens are not the token grid of the labels"
NO_TOKENS = "its rows are not the batch's tokens, so padding cannot be told there"
CACHED = " (a KV cache? use_cache=False in training calls)"
WITHOUT = "it runs without gradients inside a training step"
UNPROFITABLE = "slicing cannot pay at this size"
NO_FACTORS = "the estimator has no factors for one of its producers"  # or they are not placed yet

OF_CALL = (UNORDERED, OTHER_GRID, NO_TOKENS, CACHED, WITHOUT, UNPROFITABLE)
