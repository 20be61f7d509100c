"""Checkpoints: finding them (directory, Hub id, .gguf), reading them, and checking every key."""
