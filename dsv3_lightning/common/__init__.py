"""Helpers for all folders: atomic file writing, paths, YAML, tables, plots. Imports no torch."""
