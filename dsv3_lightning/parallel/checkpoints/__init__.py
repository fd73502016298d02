"""Checkpoints as one file or as shards: names, contents, and the choice of the newest valid one."""
