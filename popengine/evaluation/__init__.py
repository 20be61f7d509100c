"""Quality: scores of texts, tasks, comparisons of methods, and plots."""
