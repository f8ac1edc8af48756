"""The paper's kinds of tables, one command each, on the embedded example or on the user's models and text."""
