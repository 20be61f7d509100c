"""Images: decoding, resizing and placing them in a prompt."""
