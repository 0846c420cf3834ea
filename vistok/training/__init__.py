"""Training: runs, tasks, optimizer, averaging, and what happens around the updates."""
