"""Decoding with a latent cache, speculation by MTP, samplers, a server: what a trained model is used with."""
