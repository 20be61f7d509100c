"""Model families with pictures, and those that differ from Llama by more than their config."""
