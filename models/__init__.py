"""What a model is, and running it on a scan.

    networks    the torch networks (the only torch here)
    recipe      what a training job asks for
    preprocess  scan to network input: the same function in training and in serving
    preprocess2d  the same for a 2D image
    tiling      windows over a volume and their blending weights
    blend       the rolling sum of windows, and its way to the volume's grid
    bundle      a model on disk: ONNX, manifest, card, digests
    verify      the ONNX file is what the manifest says
    onnx_wire   what must be known of an ONNX file without the onnx package
    session     an onnxruntime session with verified providers (the only onnxruntime here)
    predict     segment or embed a whole volume with a session
    flips       a network that looks at mirror images too
    uncertainty entropy of the probabilities, and the flag that follows
    cascade     one pass or two: an organ's box first
    compose     a cascade out of saved bundles
    box         boxes of voxels on a grid
    splits      which subjects train, validate and test
    refs        how a model is named: models:/liver@champion

No web, no SQL, no queue.
"""
