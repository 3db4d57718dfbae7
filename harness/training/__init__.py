"""One loop for every method, with its optimizer, checkpoints and callbacks."""
