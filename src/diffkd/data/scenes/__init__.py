"""Scenes composed of the packaged images, for detection and segmentation."""
