"""Training runs: one flat loop, the folder it writes, what it measures."""
