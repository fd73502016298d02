"""The training step around the model: losses, optimizer, schedules, precision and logging."""
