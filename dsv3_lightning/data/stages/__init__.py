"""Resumable stages of preparation, over processes and machines."""
