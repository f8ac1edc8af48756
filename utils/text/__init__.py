"""What is read: corpora, windows and prompts."""
