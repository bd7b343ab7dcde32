"""What is fast, and how that is known. Each `bench_*` ends with one JSON object on its last line.

common           the device, scans to cut, one training step, the table
straightforward  the views as one writes them first, in NumPy and SciPy
bench_input      crop pairs a second on one core, and the views' share of a training step
bench_step       one pretraining step: plain or fused, eager or compiled
bench_intake     a folder of DICOM slices to a volume, against SimpleITK and dicom2nifti
bench_upload     a 2 GiB upload: the API's memory and the time, whole and in pieces
real_api         the API as a process of its own, killed and measured
chaos            the whole stack under random SIGKILL: what is lost, doubled, stuck (`make chaos`)
hostile          bombs and other hostile files, made at once
fuzz_intake      mutated files at the parsers: crashes, hangs, errors that are not ours
gpu.sh           all of it on a machine with a GPU, torch and little else
"""
