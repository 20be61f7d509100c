"""Pictures: files to pixel values, and where their tokens stand in a prompt."""
