"""What leaves: a mask as DICOM SEG, RTSTRUCT and SR, each read back before anyone gets it.

    certificate   what was proven about a file, and the comparison that proves it
    label_codes   a label's name to the standard's coded terms
    source        the headers of the source series: what a result takes over from them
    segmentation  DICOM SEG, written with highdicom
    structure_set RTSTRUCT: contours of each slice
    report        SR (TID 1500): volumes in ml
    readback      SEG and RTSTRUCT read again, with none of the writers' code
    child         `python -m imaging.results` in a process with limits: headers are hostile bytes

Axes: C columns, R rows of a source plane; A B C of the mask as in the source files. Affines map to
RAS+ mm; DICOM's own coordinates are LPS+ mm.
"""
