"""Parameters, FLOP and memory of a model as arithmetic on its ModelConfig: no torch, no device."""
