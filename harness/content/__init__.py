"""What a run reads, named by its bytes: assets, digests, and the identity that follows from them."""
