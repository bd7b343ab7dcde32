"""What a frozen encoder knows without labels: rotation and relative position (paper, section 4.4).

examples   the questions: images turned, pairs of neighbouring patches
linear     one linear layer on frozen features, and the interval of its accuracy over patients
encoders   the encoder of a checkpoint or a bundle, and the same network with random weights
run        a probe on scans, with its controls
"""
