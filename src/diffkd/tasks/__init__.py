"""Tasks: losses and measurements of classification, detection and segmentation; several processes."""
