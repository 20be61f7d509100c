"""Quality: scores of texts, tasks, comparisons of methods, plots."""
