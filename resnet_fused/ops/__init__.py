"""Fused ops: one file each, with schema, fake, autograd.Function and the composition of primitives."""

from resnet_fused.ops._autograd import autocast_dtype
from resnet_fused.ops._branch import ConvNorm, convolved_shape
from resnet_fused.ops._primitive import PRIMITIVES
from resnet_fused.ops.batch_norm_stats import Norm
from resnet_fused.ops.bn_add_relu import bn_add_relu
from resnet_fused.ops.bn_bn_add_relu import bn_bn_add_relu
from resnet_fused.ops.bn_relu import bn_relu
from resnet_fused.ops.bn_relu_maxpool import bn_relu_maxpool
from resnet_fused.ops.residual_block import residual_block

__all__ = [
    "PRIMITIVES",
    "ConvNorm",
    "Norm",
    "autocast_dtype",
    "bn_add_relu",
    "bn_bn_add_relu",
    "bn_relu",
    "bn_relu_maxpool",
    "convolved_shape",
    "residual_block",
]
