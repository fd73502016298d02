"""Checkpoints of one file or of shards: their names, what is in them, and which one is the newest good one."""
