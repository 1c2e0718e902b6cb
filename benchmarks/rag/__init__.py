"""Retrieval, measured and judged by what its store holds."""
