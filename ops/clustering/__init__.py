"""`ManifoldClustering`, its files and augmentations."""
