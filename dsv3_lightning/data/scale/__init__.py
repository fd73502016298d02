"""Cleaning on many machines: our steps on the executors of datatrove, and what a crawl would take."""
