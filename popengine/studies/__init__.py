"""Methods beside the two papers': rules, baselines, layers left out, fewer visual tokens, recordings."""
