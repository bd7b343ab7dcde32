"""What is fast, and how that is known. Each `bench_*` ends with one JSON object on its last line.

common           the device, scans to cut, one training step, the table
straightforward  the views as one writes them first, in NumPy and SciPy
bench_input      crop pairs a second on one core, and the views' share of a training step
bench_step       one pretraining step: plain or fused, eager or compiled
bench_intake     a folder of DICOM slices to a volume, against SimpleITK and dicom2nifti
gpu.sh           all of it on a machine with a GPU, torch and little else
"""
