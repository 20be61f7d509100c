"""Text: tokenizers, chat templates and prompts."""
