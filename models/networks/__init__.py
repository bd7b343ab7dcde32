"""Networks in torch: the only part of `models` that imports it.

unet3d   the 3D U-Net: encoder, decoder and both together
heads    what pretraining puts on top: projector and transformation-conditioned attention
"""
