"""A scan: reading it, its geometry, writing results.

    errors      what is wrong with a scan, with a stable code
    volume      voxels with an affine in RAS+, and the grid they came from
    nifti       NIfTI-1/2 in and out
    dicom       DICOM series to a volume (the only place where LPS becomes RAS)
    intake      whatever was sent (NIfTI, DICOM file, zip, folder) to one volume
    sandbox     the intake in a child process with limits
    resample    separable linear resampling between axis-parallel grids
    geometry    the certificate that a mask lies on its source grid
    preview     overlay PNG
    phantom     synthetic abdominal CT, written as DICOM and NIfTI

Arrays are (I, J, K) in RAS+ with spacing in array order, in mm.
"""
