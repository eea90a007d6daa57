"""What the kernels have in common: how a tile of an activation or of a gradient is made from what lies in memory.

An activation ``a`` is given by up to six pointers: x alone; x and ``shift``: x - shift; x with the statistics of its
batch norm: relu((x - mean) * invstd * weight + bias) - shift. A gradient ``dy`` of a convolution's output is given by
the gradient g of what stands behind the batch norm: g alone; g and mask bits; g, y and the batch norm (see
reference.batch_norm.input_gradient). Pointers that are not there are None, which Triton decides when it compiles.

A tile has a row for each of some pixels and a column for each of some channels. Arithmetic is float32; a tile is
rounded to the activations' dtype before it is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_affine(mean, invstd, weight, bias, channels, inside):
    """Centre, scale and offset of some channels; zeros outside, so that what is loaded as zero stays zero."""
    centre = tl.load(mean + channels, inside, 0.0)
    scale = tl.load(invstd + channels, inside, 0.0)
    if weight is not None:
        scale *= tl.load(weight + channels, inside, 0.0)
    offset = tl.zeros_like(centre)
    if bias is not None:
        offset = tl.load(bias + channels, inside, 0.0)
    return centre, scale, offset


@triton.jit
def normed(value, centre, scale, offset):
    """bn(value) of a tile as it was loaded."""
    if value.dtype == tl.float32:
        z = (value - centre[None, :]) * scale[None, :] + offset[None, :]
    else:
        # What the multiply-add loses is 2^-24 of mean / std: nothing beside the rounding of such a value.
        z = value.to(tl.float32) * scale[None, :] + (offset - centre * scale)[None, :]
    return z


@triton.jit
def activation_tile(
    x, mean, invstd, weight, bias, shift, rows, row_inside, channels, CHANNELS, PADDED: tl.constexpr = True
):
    """a at the pixels ``rows`` of a tensor with CHANNELS channels.

    ``PADDED``: it is 0 in rows outside, as padding of a is; else anything finite.
    """
    inside = channels < CHANNELS
    value = tl.load(
        x + rows[:, None] * CHANNELS + channels[None, :], row_inside[:, None] & inside[None, :], other=0.0
    )
    if mean is not None:
        centre, scale, offset = channel_affine(mean, invstd, weight, bias, channels, inside)
        z = normed(value, centre, scale, offset)
        if PADDED and shift is None:
            z *= row_inside.to(tl.float32)[:, None]  # selecting would be done for every element by itself
        a = tl.where(z <= 0, 0.0, z)
        if shift is not None:
            a -= tl.load(shift + channels, inside, 0.0)[None, :]
            if PADDED:
                a = tl.where(row_inside[:, None], a, 0.0)
        value = a.to(x.dtype.element_ty)
    elif shift is not None:
        a = value.to(tl.float32) - tl.load(shift + channels, inside, 0.0)[None, :]
        value = tl.where(row_inside[:, None], a, 0.0).to(x.dtype.element_ty)
    return value


@triton.jit
def bits_tile(bits, rows, row_inside, first, CHANNELS, BLOCK: tl.constexpr):
    """Mask bits of BLOCK channels from ``first``, a multiple of 8, as booleans; one byte is loaded for eight."""
    pitch = (CHANNELS + 7) // 8
    places = first // 8 + tl.arange(0, BLOCK // 8)
    packed = tl.load(
        bits + rows[:, None] * pitch + places[None, :],
        row_inside[:, None] & (places < pitch)[None, :],
        other=0,
    )
    each = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (rows.shape[0], BLOCK)) != 0


@triton.jit
def packed_bits(kept, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The bytes of a tile of booleans, (ROWS, BLOCK / 8)."""
    each = tl.reshape(kept.to(tl.int32), (ROWS, BLOCK // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(each, 2).to(tl.uint8)


@triton.jit
def gradient_tile(
    g,
    bits,
    y,
    mean,
    invstd,
    weight,
    bias,
    sum_dz,
    sum_dz_xhat,
    pixels,
    rows,
    row_inside,
    first,
    CHANNELS,
    BLOCK: tl.constexpr,
):
    """dy at the pixels ``rows``, BLOCK channels from ``first``; 0 outside. ``pixels``: those of the statistics."""
    channels = first + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    places = rows[:, None] * CHANNELS + channels[None, :]
    tile_inside = row_inside[:, None] & inside[None, :]
    value = tl.load(g + places, tile_inside, other=0.0)
    if bits is not None:
        # Selected, not multiplied: what the ReLU held back may be infinite or NaN.
        value = tl.where(bits_tile(bits, rows, row_inside, first, CHANNELS, BLOCK), value, 0.0)
    if mean is not None:
        centre, scale, offset = channel_affine(mean, invstd, weight, bias, channels, inside)
        dz = value.to(tl.float32)
        if y is not None:
            centred = tl.load(y + places, tile_inside, other=0.0).to(tl.float32) - centre[None, :]
            if bits is None:
                dz = tl.where(centred * scale[None, :] + offset[None, :] <= 0, 0.0, dz)
            if sum_dz is not None:
                level = tl.load(sum_dz + channels, inside, 0.0) / pixels
                slope = (
                    tl.load(sum_dz_xhat + channels, inside, 0.0)
                    * tl.load(invstd + channels, inside, 0.0)
                    / pixels
                )
                dz = dz - level[None, :] - centred * slope[None, :]
        value = tl.where(row_inside[:, None], dz * scale[None, :], 0.0).to(g.dtype.element_ty)
    return value


@triton.jit
def pixel_of(rows, HEIGHT, WIDTH):
    """Image, row and column of pixels that are counted through images of HEIGHT x WIDTH."""
    line = rows // WIDTH
    return line // HEIGHT, line % HEIGHT, rows % WIDTH


@triton.jit
def taps_inside(first, DILATION, SIZE, TAPS: tl.constexpr):
    """A bit for each of up to 31 taps, from ``first`` on: whether it is within 0 .. SIZE - 1."""
    seen = tl.zeros_like(first)
    for tap in tl.static_range(TAPS):
        at = first + tap * DILATION
        seen |= ((at >= 0) & (at < SIZE)).to(tl.int32) << tap
    return seen


@triton.jit
def store_tile_sums(da, y, mean, invstd, weight, bias, sums, tile, tiles, rows, inside, channels, CHANNELS):
    """The sums over a tile's pixels of dz and of dz * (y - mean), dz = da behind relu(bn(y)), for ``sum_tiles``."""
    channel_inside = channels < CHANNELS
    centre, scale, offset = channel_affine(mean, invstd, weight, bias, channels, channel_inside)
    whole = inside[:, None] & channel_inside[None, :]
    value = tl.load(y + rows[:, None] * CHANNELS + channels[None, :], whole, other=0.0)
    centred = value.to(tl.float32) - centre[None, :]
    dz = tl.where((centred * scale[None, :] + offset[None, :] <= 0) | ~whole, 0.0, da)
    place = sums + tile * CHANNELS + channels
    tl.store(place, tl.sum(dz, 0), channel_inside)
    tl.store(place + tiles * CHANNELS, tl.sum(dz * centred, 0), channel_inside)
