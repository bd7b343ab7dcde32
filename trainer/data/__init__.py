"""From scans on disk to batches on the device, without worker processes.

scan_set   what a scan on disk is, and who is in which split
scan_folder  a folder of scans as people have it
scans      a folder or a list to scans, split by subject
cache      each volume preprocessed once, content-addressed
resident   all volumes in one flat tensor on the device; crops by one gather
cases      every scan of a fine-tuning, read and judged before the first step
label_crop a labelled scan cut to the box of some labels
patches    a batch cut out of resident volumes, flipped and turned as drawn
examples   what a classifier learns from: places in scans, or whole scans
sampling   where crops and patches are cut: drawn as numbers
augment    views from crops: drawn as numbers, then applied to the whole batch
images2d   2D images: cache, tensor on the device, and which of them a step takes
augment2d  views of 2D images, likewise
"""
