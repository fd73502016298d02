"""Data of preference and reinforcement learning: pairs of answers, and prompts with the columns that rewards read."""
