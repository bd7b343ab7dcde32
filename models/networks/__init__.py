"""Networks in torch: the only part of `models` that imports it.

unet3d         the 3D U-Net: encoder, decoder and both together
resnet_unet2d  the 2D U-Net on a ResNet-18: the same three
classifier     an encoder, pooled, with a linear layer: 3D or 2D
heads          what pretraining puts on top: projector and transformation-conditioned attention
"""
