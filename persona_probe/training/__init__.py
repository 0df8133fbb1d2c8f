"""Training: the one trainer behind pre-training, narrow fine-tunes and the lab."""
