"""What a run leaves behind: all that the analysis may import. No torch, no pandas."""
