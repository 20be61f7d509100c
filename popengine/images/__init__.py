"""Images: decoding, resizing and their place in a prompt."""
