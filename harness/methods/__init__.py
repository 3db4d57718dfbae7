"""What is trained: LoRA, its files, and the counts of parameters."""
