"""Demonstrations and measurements that run from a checkout of the repository."""
