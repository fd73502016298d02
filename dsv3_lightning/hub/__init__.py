"""To and from Hugging Face folders, in the released checkpoints' layout."""
