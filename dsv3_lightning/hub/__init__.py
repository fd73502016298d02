"""Import from and export to Hugging Face folders in the layout of the released checkpoints."""
