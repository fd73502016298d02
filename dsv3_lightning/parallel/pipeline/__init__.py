"""Pipelines: the layers of the model spread over ranks, between which micro-batches travel (docs/pipelines.md)."""
