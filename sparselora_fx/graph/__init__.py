"""FX plumbing that knows neither LoRA nor sparsity."""
