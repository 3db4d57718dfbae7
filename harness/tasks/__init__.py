"""What is predicted: objectives, scores, generation."""
