"""A conversation on a terminal or a pipe: lines, slash commands, and answers that stream."""
