"""A child process for untrusted files: tokenizers and chat templates of checkpoints."""
