"""Does sparse training stay close to dense training? What probes found, and what follows."""
