"""Train DeepSeek-V3-architecture language models from one YAML file, on a laptop or a cluster."""

__version__ = "0.1.0"
