"""Chunk-Distilled Language Modeling: all logic of the five scripts, one room (module) each."""
