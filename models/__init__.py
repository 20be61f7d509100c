"""Forward passes, one file per model family, and the parts they share in `models.layers`."""
