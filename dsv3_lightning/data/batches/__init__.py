"""Batches from token files on disk."""
