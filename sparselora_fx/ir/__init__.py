"""Every op that a rewritten graph may hold; the eager body of an op is its meaning."""
