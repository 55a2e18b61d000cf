"""A model between `compile` and `restore`: hooks, forward, what each call is."""
