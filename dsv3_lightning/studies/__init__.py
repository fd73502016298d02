"""Experiments of several runs: running them, comparing them, and the verdicts on the papers' claims."""
