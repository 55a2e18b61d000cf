"""The user's `nn.Module`, without a graph: frozen weights, blocks, signatures."""
