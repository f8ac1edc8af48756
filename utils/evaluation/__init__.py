"""What stage 5 does around the decode loop: results, perplexity, reports."""
