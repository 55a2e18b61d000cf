"""What a user asks for: sparsity, schedule, score, budget."""
