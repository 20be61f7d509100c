"""Methods that are neither paper's: rules, baselines, layers left out, fewer visual tokens, recordings."""
