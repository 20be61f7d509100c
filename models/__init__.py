"""Forward passes, one file per model family, and what they share: layers, attention, feed_forward and products."""
