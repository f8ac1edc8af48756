"""Stage 2: token probabilities and hidden states of a text."""
