"""One file for each claim of the documentation that is a number."""
