"""One causal language model: load, score, decode on a KV cache."""
