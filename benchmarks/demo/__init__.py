"""The shipped model and what `make demo` does with it."""
