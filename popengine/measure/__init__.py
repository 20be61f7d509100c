"""Measuring: quality, tasks, speed, studies, and how they are shown."""
