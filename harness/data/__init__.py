"""From files and the hub to batches of tokens."""
