"""Stage 5's decode loop: proposals, acceptance, drafts, generation."""
