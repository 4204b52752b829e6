"""What lies on disk: weights, configs, history, run folders."""
