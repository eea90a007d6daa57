"""What the kernels share: how a tile of a lazy operand (types) is computed from the tensors that are in memory.

A kernel takes an operand as pointers, of which some may be None; Triton compiles a variant for each combination. The
functions here take an Activation as the tuple (x, mean, bn_coeffs, shift), and a Gradient as (g, mask, y, mean,
bn_coeffs, dy_coeffs), with None for what is not given:

    Activation   x                                        x
                 x, shift                                 x - shift
                 x, mean, bn_coeffs                       relu(bn(x))
                 x, mean, bn_coeffs, shift                relu(bn(x)) - shift
    Gradient     g                                        g
                 g, mask                                  g * mask
                 g, y, mean, bn_coeffs, dy_coeffs         dy, where the mask of relu(bn(y)) is recomputed
                 g, mask, y, mean, bn_coeffs, dy_coeffs   dy, of dz = g * mask
    without dy_coeffs the statistics are the running ones: dy = dz * scale

``bn_coeffs`` and ``dy_coeffs`` are (3, C), see types.make_bn_coeffs and types.make_dy_coeffs. Kernels of float32
activations read mean and the rows 0 and 1, those of 16-bit activations the rows 0 and 2.

Activations are NHWC: a row for each of the N*H*W pixels, a column for each channel. A tile has BLOCK pixels x BLOCK
channels, given by offsets (``pixel_offs``, ``channel_offs``); inside are the pixels of ``pixel_valid`` and the channels
below ``channels``. Arithmetic is float32; a tile is rounded to the activations' dtype before tensor cores multiply it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(matrix, row_offs, row_valid, column_offs, columns):
    """A tile of a matrix (rows, columns), as it is in memory; 0 outside."""
    pointers = matrix + row_offs[:, None] * columns + column_offs[None, :]
    return tl.load(pointers, row_valid[:, None] & (column_offs < columns)[None, :], other=0.0)


@triton.jit
def store_tile(matrix, value, row_offs, row_valid, column_offs, columns):
    """Stores a tile of a matrix (rows, columns), rounded to its dtype; the counterpart of ``load_tile``."""
    valid = row_valid[:, None] & (column_offs < columns)[None, :]
    pointers = matrix + row_offs[:, None] * columns + column_offs[None, :]
    tl.store(pointers, value.to(matrix.dtype.element_ty), valid)


@triton.jit
def load_bn_coeffs(mean, bn_coeffs, channel_offs, channels, dtype: tl.constexpr):
    """center, scale and offset for ``apply_bn``, each (BLOCK,); 0 outside, so that what is loaded as 0 stays 0.

    mean: (C,), bn_coeffs: (3, C), of a batch norm of ``channels`` channels; dtype: of its input.
    """
    channel_valid = channel_offs < channels
    scale = tl.load(bn_coeffs + channel_offs, channel_valid, 0.0)
    if dtype == tl.float32:
        center = tl.load(mean + channel_offs, channel_valid, 0.0)
        offset = tl.load(bn_coeffs + channels + channel_offs, channel_valid, 0.0)
    else:
        center = tl.zeros_like(scale)
        offset = tl.load(bn_coeffs + 2 * channels + channel_offs, channel_valid, 0.0)
    return center, scale, offset


@triton.jit
def runtime_zero(count):
    """A run-time 0 that the compiler can't constant-fold; it keeps loads of a computed operand of tl.dot asynchronous.

    Triton moves the conversion to that operand's layout up to the loads where all between is elementwise. Converted
    loads are not asynchronous any more, and hold more registers; a splat of this value stops the conversion.
    """
    return tl.where(count > 0, 0.0, 1.0)


@triton.jit
def apply_bn(value, center, scale, offset):
    """bn(value), float32, of a tile (BLOCK, BLOCK) as it was loaded.

    One multiply-add for 16 bits: its rounding error is 2^-24 of mean / std, small beside the rounding of such a value.
    """
    if value.dtype == tl.float32:
        z = (value - center[None, :]) * scale[None, :] + offset[None, :]
    else:
        z = value.to(tl.float32) * scale[None, :] + offset[None, :]
    return z


@triton.jit
def load_activation_coeffs(a, channel_offs, channels):
    """center, scale, offset and the shift's values for ``apply_activation``, each (BLOCK,); 0 where not given."""
    x, mean, bn_coeffs, shift = a
    zeros = tl.zeros(channel_offs.shape, tl.float32)
    center, scale, offset, shift_value = zeros, zeros, zeros, zeros
    if bn_coeffs is not None:
        center, scale, offset = load_bn_coeffs(mean, bn_coeffs, channel_offs, channels, x.dtype.element_ty)
    if shift is not None:
        shift_value = tl.load(shift + channel_offs, channel_offs < channels, 0.0)
    return center, scale, offset, shift_value


@triton.jit
def apply_activation(
    value,  # (BLOCK, BLOCK) tile of x
    a,
    coeffs,  # ``load_activation_coeffs``
    pixel_valid,  # (BLOCK,)
    PADDED: tl.constexpr,  # whether pixels outside are 0, as padding of a is; otherwise arbitrary but finite
):
    """a of a tile of x, in the dtype of x."""
    _, _, bn_coeffs, shift = a
    center, scale, offset, shift_value = coeffs
    if bn_coeffs is not None or shift is not None:
        if bn_coeffs is not None:
            z = apply_bn(value, center, scale, offset)
            if PADDED and shift is None:
                # tl.where would compute a condition for each element
                z *= pixel_valid.to(tl.float32)[:, None]
            result = tl.where(z <= 0, 0.0, z)
        else:
            result = value.to(tl.float32)
        if shift is not None:
            result -= shift_value[None, :]
            if PADDED:
                result *= pixel_valid.to(tl.float32)[:, None]
        return result.to(value.dtype)
    return value


@triton.jit
def load_activation_tile(a, pixel_offs, pixel_valid, channel_offs, channels, PADDED: tl.constexpr):
    """A tile of ``a``, (BLOCK, BLOCK); PADDED: see ``apply_activation``."""
    coeffs = load_activation_coeffs(a, channel_offs, channels)
    value = load_tile(a[0], pixel_offs, pixel_valid, channel_offs, channels)
    return apply_activation(value, a, coeffs, pixel_valid, PADDED)


@triton.jit
def load_mask_tile(mask, pixel_offs, pixel_valid, first_channel, channels, BLOCK: tl.constexpr):
    """The mask's bits of BLOCK channels from ``first_channel``, a multiple of 8, as booleans (pixels, BLOCK).

    mask: (pixels, ceil(channels / 8)) bytes, or the same memory as words of 32 bits (arguments.mask_words).
    """
    WIDTH: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    row_words = (channels + WIDTH - 1) // WIDTH
    word_offs = first_channel // WIDTH + tl.arange(0, BLOCK // WIDTH)
    packed = tl.load(
        mask + pixel_offs[:, None] * row_words + word_offs[None, :],
        pixel_valid[:, None] & (word_offs < row_words)[None, :],
        other=0,
    )
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]) & 1
    return tl.reshape(bits, (pixel_offs.shape[0], BLOCK)) != 0


@triton.jit
def store_mask_tile(mask, value, pixel_offs, pixel_valid, first_channel, channels, BLOCK: tl.constexpr):
    """Stores booleans (pixels, BLOCK) as bits of the mask; the counterpart of ``load_mask_tile``."""
    WIDTH: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    row_words = (channels + WIDTH - 1) // WIDTH
    word_offs = first_channel // WIDTH + tl.arange(0, BLOCK // WIDTH)
    bits = tl.reshape(value.to(tl.int32), (pixel_offs.shape[0], BLOCK // WIDTH, WIDTH))
    packed = tl.sum(bits << tl.arange(0, WIDTH)[None, None, :], 2)
    tl.store(
        mask + pixel_offs[:, None] * row_words + word_offs[None, :],
        packed.to(mask.dtype.element_ty),
        pixel_valid[:, None] & (word_offs < row_words)[None, :],
    )


@triton.jit
def load_gradient_coeffs(dy, channel_offs, channels):
    """center, scale, offset, level and slope for ``load_gradient_tile``, each (BLOCK,); 0 where not given."""
    g, _, _, mean, bn_coeffs, dy_coeffs = dy
    zeros = tl.zeros(channel_offs.shape, tl.float32)
    center, scale, offset, level, slope = zeros, zeros, zeros, zeros, zeros
    if bn_coeffs is not None:
        center, scale, offset = load_bn_coeffs(mean, bn_coeffs, channel_offs, channels, g.dtype.element_ty)
    if dy_coeffs is not None:
        channel_valid = channel_offs < channels
        slope = tl.load(dy_coeffs + channel_offs, channel_valid, 0.0)
        if g.dtype.element_ty == tl.float32:
            level = tl.load(dy_coeffs + channels + channel_offs, channel_valid, 0.0)
        else:
            level = tl.load(dy_coeffs + 2 * channels + channel_offs, channel_valid, 0.0)
    return center, scale, offset, level, slope


@triton.jit
def load_masked_tile(g, mask, pixel_offs, pixel_valid, first_channel, channels, BLOCK: tl.constexpr):
    """g * mask (g where mask is None) of BLOCK channels from ``first_channel``; 0 outside.

    g: (pixels, channels); mask: see ``load_mask_tile``.
    """
    value = load_tile(g, pixel_offs, pixel_valid, first_channel + tl.arange(0, BLOCK), channels)
    if mask is not None:
        # Selected, not multiplied: where the mask is 0 the gradient may be infinite or NaN.
        bits = load_mask_tile(mask, pixel_offs, pixel_valid, first_channel, channels, BLOCK)
        value = tl.where(bits, value, 0.0)
    return value


@triton.jit
def load_gradient_tile(
    dy,
    coeffs,  # ``load_gradient_coeffs``
    zero,  # ``runtime_zero``
    pixel_offs,  # (pixels of the tile,)
    pixel_valid,  # (pixels of the tile,)
    first_channel,
    channels,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,  # see ``apply_activation``
):
    """A tile of dy, BLOCK channels from ``first_channel``, in the dtype of g.

    dy = dz * scale - level - (y - mean) * slope; for 16 bits two multiply-adds, as in ``apply_bn``.
    """
    g, mask, y, _, bn_coeffs, dy_coeffs = dy
    center, scale, offset, level, slope = coeffs
    value = load_masked_tile(g, mask, pixel_offs, pixel_valid, first_channel, channels, BLOCK)
    if bn_coeffs is not None:
        dz = value.to(tl.float32)
        if mask is None or dy_coeffs is not None:
            y_tile = load_tile(y, pixel_offs, pixel_valid, first_channel + tl.arange(0, BLOCK), channels)
        if mask is None:
            dz = tl.where(apply_bn(y_tile, center, scale, offset) <= zero, 0.0, dz)
        if dy_coeffs is None:
            result = dz * scale[None, :]
        elif value.dtype == tl.float32:
            result = dz * scale[None, :] - level[None, :] - (y_tile - center[None, :]) * slope[None, :]
        else:
            result = dz * scale[None, :] - (y_tile.to(tl.float32) * slope[None, :] + level[None, :])
        if PADDED:
            result *= pixel_valid.to(tl.float32)[:, None]
        value = result.to(value.dtype)
    return value


@triton.jit
def unravel_pixels(pixel_offs, height, width):
    """Image, row and column of pixels that are counted through images of height x width."""
    line = pixel_offs // width
    return line // height, line % height, pixel_offs % width


@triton.jit
def advance_pixels(image, h, w, step_images, step_h, step_w, height, width):
    """``unravel_pixels`` of pixels advanced by step_images, step_h and step_w; without a division."""
    w += step_w
    carry = (w >= width).to(tl.int32)
    w -= carry * width
    h += step_h + carry
    carry = (h >= height).to(tl.int32)
    return image + step_images + carry, h - carry * height, w


@triton.jit
def valid_taps(first, dilation, size, TAPS: tl.constexpr):
    """A bit for each of up to 31 kernel positions: whether first + position * dilation is within 0 .. size - 1."""
    valid = tl.zeros_like(first)
    for tap in tl.static_range(TAPS):
        index = first + tap * dilation
        valid |= ((index >= 0) & (index < size)).to(tl.int32) << tap
    return valid


@triton.jit
def advance_tap(r, s, first_channel, channels, taps_w, BLOCK: tl.constexpr):
    """Kernel row and column and first channel of a loop's next step; counted, since divisions take longer."""
    first_channel += BLOCK
    tap_done = first_channel >= channels
    first_channel = tl.where(tap_done, 0, first_channel)
    s = tl.where(tap_done, s + 1, s)
    row_done = s == taps_w
    return tl.where(row_done, r + 1, r), tl.where(row_done, 0, s), first_channel


@triton.jit
def store_tile_sums(
    da,  # (BLOCK, BLOCK) float32, the gradient w.r.t. relu(bn(x))
    value,  # (BLOCK, BLOCK) tile of x
    mean,  # (channels,)
    bn_coeffs,  # (3, channels)
    tile_sums,  # (2, channels, tiles)
    tile,
    tiles,
    pixel_valid,  # (BLOCK,)
    channel_offs,  # (BLOCK,)
    channels,
):
    """Stores the sums over a tile's pixels of dz = da * mask and of dz * (x - mean), for reductions.sum_tiles."""
    channel_valid = channel_offs < channels
    center, scale, offset = load_bn_coeffs(mean, bn_coeffs, channel_offs, channels, value.dtype)
    valid = pixel_valid[:, None] & channel_valid[None, :]
    dz = tl.where((apply_bn(value, center, scale, offset) <= 0) | ~valid, 0.0, da)
    pointers = tile_sums + channel_offs * tiles + tile
    tl.store(pointers, tl.sum(dz, 0), channel_valid)
    centered = value.to(tl.float32) - tl.load(mean + channel_offs, channel_valid, 0.0)[None, :]
    tl.store(pointers + channels * tiles, tl.sum(dz * centered, 0), channel_valid)
