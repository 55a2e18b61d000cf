"""Facts about a graph. Nothing here edits one."""
