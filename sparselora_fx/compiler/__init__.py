"""From a Dynamo graph to a callable: backend, pipeline, pieces."""
