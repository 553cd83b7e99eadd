"""Image classification: how it is judged, the adapter in front of every classifier, datasets and model sources."""
