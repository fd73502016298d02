"""Cleaning of documents before they become tokens: pure functions from a document to a document or a reason to drop it.

No torch. Read in the order config, repair, language, quality (with gopher, c4, fineweb, code), private, words, minhash,
contamination (what is computed from one document), then duplicates (over all documents).
"""
