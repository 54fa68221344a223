"""Embedding models for retrieval: load, tune on pairs of a query and what answers it, and write what was tuned."""
