"""Losses, optimizer, schedules, precision and logging: what a training step needs beside the model."""
