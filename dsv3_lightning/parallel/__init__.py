"""One mesh of processes, and what is laid over it: sharded parameters, experts apart, checkpoints of all of them."""
