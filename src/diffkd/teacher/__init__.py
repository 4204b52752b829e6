"""What may be done to a frozen teacher: its input, folded BatchNorms, cached features, its classifier."""
