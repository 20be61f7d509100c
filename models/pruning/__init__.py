"""What a pass decides about: which channels run, by which rule, and what the user asked for."""
