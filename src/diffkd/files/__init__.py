"""Files on disk: weights, configs, history, run folders."""
