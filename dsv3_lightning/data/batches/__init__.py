"""Tokens on disk to batches."""
