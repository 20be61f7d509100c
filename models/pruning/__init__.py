"""The two papers' methods: their settings, partitions, POP for channels, heads and experts, and Prefill-Only."""
