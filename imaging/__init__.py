"""A scan: reading it, its geometry, writing results.

    errors         what is wrong with a scan, with a stable code
    limits         absolute caps on what a scan may be
    volume         voxels with an affine in RAS+, and the grid they came from
    orientation    a file's axes to RAS+ and back
    checks         what must hold for any affine and any voxels
    nifti          NIfTI-1/2 in and out
    dicom          a DICOM series to a volume
    dicom_file     the bytes of a DICOM file as a data set, without trust
    dicom_header   one DICOM object: header and pixels
    dicom2d        a radiograph as its sender would have it shown
    dicom_stack    image planes to a grid (the only place where DICOM's LPS becomes RAS)
    dicom_voxels   the pixels of ordered planes into one array
    slices         tilted or unevenly spaced slices to a regular grid, and labels back to them
    nrrd           headers of NRRD
    metaimage      headers of MetaImage
    stored         voxels as they lie in a file, streamed
    volume_files   NIfTI, NRRD or MetaImage, told by content, to one volume
    archive        the files of a zip, by place and never by name
    image2d        one 2D image: PNG, JPEG, radiograph
    intake         whatever was sent (a file, a zip, a folder) to one volume
    kinds          what a scan is meant to be
    forkserver     a loaded process that forks a child for each task
    sandbox        the intake in a child process with limits
    resample       separable linear resampling between axis-parallel grids
    geometry       the certificate that a mask lies on its source grid
    preview        overlay PNG
    results        the mask as DICOM SEG, RTSTRUCT and SR, certified
    datasets       public data sets in their own layouts: what of a folder to import
    phantom        synthetic abdominal CT
    phantom_dicom  a synthetic volume as a DICOM series

Arrays are (I, J, K) in RAS+ with spacing in array order, in mm.
"""
