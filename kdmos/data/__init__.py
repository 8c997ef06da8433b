"""Scans, labels, poses and logits on disk; the packed batch; augmentation; the synthetic street."""
