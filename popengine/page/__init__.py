"""The page of `popengine explain`."""
