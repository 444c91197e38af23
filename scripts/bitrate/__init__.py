"""Points, runs and report of PER over bits per second."""
