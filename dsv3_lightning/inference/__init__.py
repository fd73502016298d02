"""Inference: decoding with a latent cache, speculative decoding by MTP, sampling, and a server."""
