"""Fused ops: schema, fake and implementations of each, and the autograd.Functions around them."""

from resnet_fused.ops._autograd import autocast_dtype
from resnet_fused.ops.bn_add_relu import bn_add_relu
from resnet_fused.ops.bn_bn_add_relu import bn_bn_add_relu
from resnet_fused.ops.bn_relu import bn_relu
from resnet_fused.ops.bn_relu_maxpool import bn_relu_maxpool
from resnet_fused.ops.inference import by_images
from resnet_fused.ops.residual_block import convolved_shape, residual_block

__all__ = [
    "autocast_dtype",
    "bn_add_relu",
    "bn_bn_add_relu",
    "bn_relu",
    "bn_relu_maxpool",
    "by_images",
    "convolved_shape",
    "residual_block",
]
