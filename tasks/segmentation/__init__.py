"""Semantic segmentation: how it is judged, the adapter in front of MMSegmentation models, datasets and models."""
