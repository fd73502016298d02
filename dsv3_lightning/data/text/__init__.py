"""Text to tokens on disk."""
