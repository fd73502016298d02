"""Experiments of several runs: running and comparing them, and testing the papers' claims."""
