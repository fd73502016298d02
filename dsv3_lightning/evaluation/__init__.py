"""Evaluation: tasks in jsonl files, how answers are scored and checked, and what the scores are worth."""
