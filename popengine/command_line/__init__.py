"""What all commands share: their parser, flags, streams, interrupts, and the way to their exit status."""
