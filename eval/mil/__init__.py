"""Slide-level models on bags of embeddings."""
