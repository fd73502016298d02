"""Training on a mesh of processes: sharded parameters, expert parallelism, and checkpoints of both."""
