"""kdmos: moving-object segmentation of LiDAR scans in real time."""

__version__ = "0.1.0"
