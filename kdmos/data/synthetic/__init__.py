"""The synthetic LiDAR: ray casting, the sensor, and the street it drives through."""
