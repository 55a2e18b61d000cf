"""Builders that several passes share."""
