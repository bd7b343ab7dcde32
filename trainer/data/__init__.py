"""From scans on disk to batches on the device, without worker processes.

scans      which scans there are, and in which split
cache      each volume preprocessed once, content-addressed
resident   all volumes in one flat tensor on the device; crops by one gather
sampling   where crops and patches are cut: drawn as numbers
augment    views from crops: drawn as numbers, then applied to the whole batch
images2d   2D images: cache, tensor on the device, and which of them a step takes
augment2d  views of 2D images, likewise
"""
