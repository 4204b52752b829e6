"""Tasks: losses and metrics of classification, detection and segmentation; distributed training."""
