"""Chunk-Distilled Language Modeling: the logic behind the five scripts."""
