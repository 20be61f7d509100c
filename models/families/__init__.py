"""Model families that read pictures, and families that differ from Llama by more than their config."""
