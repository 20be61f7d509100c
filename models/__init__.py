"""Forward passes, one file per model family, and their shared parts: layers, attention, feed_forward and products."""
