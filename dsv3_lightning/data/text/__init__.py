"""Token files on disk from text."""
