"""A run's folder: its settings, checkpoints and reports, and the models in it."""
