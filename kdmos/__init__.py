"""kdmos: moving-object segmentation of LiDAR scans."""

__version__ = "0.1.0"
