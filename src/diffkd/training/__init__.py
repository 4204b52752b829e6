"""One training: what it is built from, its loop, checkpoints and reports."""
