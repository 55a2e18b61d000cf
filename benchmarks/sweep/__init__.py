"""Every architecture of transformers, tiny and random."""
