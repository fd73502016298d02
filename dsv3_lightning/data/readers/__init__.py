"""Kinds of files besides plain text and jsonl, each read as documents. No torch."""
