"""Pipelines: how the layers are split into chunks, and what each schedule makes of their times."""
