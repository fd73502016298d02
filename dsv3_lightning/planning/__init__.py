"""Estimates of parameters, FLOP, memory and step time from a ModelConfig, without torch or a device."""
