"""Stages 3 and 4 and how their output is read: chunks, token tries, context vectors, search."""
