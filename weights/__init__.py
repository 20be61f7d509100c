"""Checkpoints: finding them (directory, Hub id, .gguf), reading them, checking every key."""
