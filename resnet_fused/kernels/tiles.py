"""What the kernels have in common: how a tile of an activation or of a gradient is made from what lies in memory.

An activation ``a`` is given by up to four pointers: x alone; x and ``shift``: x - shift; x with mean and ``terms`` of
its batch norm: relu(bn(x)) - shift. A gradient ``dy`` of a convolution's output is given by the gradient g of what
stands behind the batch norm: g alone; g and mask bits; g, y, mean, terms and, unless the statistics are constants,
``slopes``. Pointers that are not there are None, which Triton decides when it compiles.

``terms`` and ``slopes`` (types) are what is left of a batch norm and of its gradient once the sums over
the pixels are known: one load each of what a loop needs of a channel. Kernels of 16 bits read the first and
the last row.

A tile has a row for each of some pixels and a column for each of some channels. Arithmetic is float32; a tile is
rounded to the activations' dtype before it is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def affine_terms(mean, bn_coeffs, channels, inside, CHANNELS, dtype: tl.constexpr):
    """Centre, scale and offset of some channels for ``normed``; zeros outside: what is loaded as zero stays zero."""
    scale = tl.load(bn_coeffs + channels, inside, 0.0)
    if dtype == tl.float32:
        centre = tl.load(mean + channels, inside, 0.0)
        offset = tl.load(bn_coeffs + CHANNELS + channels, inside, 0.0)
    else:
        centre = tl.zeros_like(scale)
        offset = tl.load(bn_coeffs + 2 * CHANNELS + channels, inside, 0.0)
    return centre, scale, offset


@triton.jit
def unknown_zero(COUNT):
    """0 as only runs can tell, for arithmetic on a tile that is to be a product's operand in registers.

    Triton moves the conversion to that operand's layout up to the loads where all between is elementwise: loads whose
    values are converted are no asynchronous copies any more, and more registers are held. A splat of this ends that.
    """
    return tl.where(COUNT > 0, 0.0, 1.0)


@triton.jit
def normed(value, centre, scale, offset):
    """bn(value) of a tile as it was loaded.

    One multiply-add for 16 bits: what it loses is 2^-24 of mean / std, nothing beside the rounding of such a value.
    """
    if value.dtype == tl.float32:
        z = (value - centre[None, :]) * scale[None, :] + offset[None, :]
    else:
        z = value.to(tl.float32) * scale[None, :] + offset[None, :]
    return z


@triton.jit
def activation_terms(mean, bn_coeffs, shift, channels, inside, CHANNELS, dtype: tl.constexpr):
    """What ``activated`` needs to know of channels; zeros for what there is not."""
    nothing = tl.zeros(channels.shape, tl.float32)
    centre, scale, offset, level = nothing, nothing, nothing, nothing
    if bn_coeffs is not None:
        centre, scale, offset = affine_terms(mean, bn_coeffs, channels, inside, CHANNELS, dtype)
    if shift is not None:
        level = tl.load(shift + channels, inside, 0.0)
    return centre, scale, offset, level


@triton.jit
def activated(value, bn_coeffs, shift, centre, scale, offset, level, row_inside, PADDED: tl.constexpr):
    """a of a tile as it was loaded. ``PADDED``: it is 0 in rows outside, as padding of a is; else anything finite."""
    if bn_coeffs is not None or shift is not None:
        if bn_coeffs is not None:
            z = normed(value, centre, scale, offset)
            if PADDED and shift is None:
                z *= row_inside.to(tl.float32)[:, None]  # selecting would be done for every element by itself
            a = tl.where(z <= 0, 0.0, z)
        else:
            a = value.to(tl.float32)
        if shift is not None:
            a -= level[None, :]
            if PADDED:
                a *= row_inside.to(tl.float32)[:, None]
        return a.to(value.dtype)
    return value


@triton.jit
def activation_tile(
    x, mean, bn_coeffs, shift, rows, row_inside, channels, CHANNELS, PADDED: tl.constexpr = True
):
    """a at the pixels ``rows`` of a tensor with CHANNELS channels; ``PADDED`` as in ``activated``."""
    inside = channels < CHANNELS
    centre, scale, offset, level = activation_terms(
        mean, bn_coeffs, shift, channels, inside, CHANNELS, x.dtype.element_ty
    )
    value = tile_of(x, rows, row_inside, channels, inside, CHANNELS)
    return activated(value, bn_coeffs, shift, centre, scale, offset, level, row_inside, PADDED)


@triton.jit
def tile_of(x, rows, row_inside, channels, inside, CHANNELS):
    """What lies in memory; 0 outside."""
    places = x + rows[:, None] * CHANNELS + channels[None, :]
    return tl.load(places, row_inside[:, None] & inside[None, :], other=0.0)


@triton.jit
def bits_tile(mask, rows, row_inside, first, CHANNELS, BLOCK: tl.constexpr):
    """Mask bits of BLOCK channels from ``first``, a multiple of 8, as booleans; ``bits`` are bytes or words."""
    WIDTH: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    pitch = (CHANNELS + WIDTH - 1) // WIDTH
    places = first // WIDTH + tl.arange(0, BLOCK // WIDTH)
    packed = tl.load(
        mask + rows[:, None] * pitch + places[None, :],
        row_inside[:, None] & (places < pitch)[None, :],
        other=0,
    )
    each = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]) & 1
    return tl.reshape(each, (rows.shape[0], BLOCK)) != 0


@triton.jit
def store_bits(mask, kept, rows, row_inside, first, CHANNELS, BLOCK: tl.constexpr):
    """Writes a tile of booleans, BLOCK channels from ``first``, as mask bits; the counterpart of ``bits_tile``."""
    WIDTH: tl.constexpr = mask.dtype.element_ty.primitive_bitwidth
    pitch = (CHANNELS + WIDTH - 1) // WIDTH
    places = first // WIDTH + tl.arange(0, BLOCK // WIDTH)
    each = tl.reshape(kept.to(tl.int32), (rows.shape[0], BLOCK // WIDTH, WIDTH))
    packed = tl.sum(each << tl.arange(0, WIDTH)[None, None, :], 2)
    tl.store(
        mask + rows[:, None] * pitch + places[None, :],
        packed.to(mask.dtype.element_ty),
        row_inside[:, None] & (places < pitch)[None, :],
    )


@triton.jit
def gradient_terms(mean, bn_coeffs, dy_coeffs, channels, inside, CHANNELS, dtype: tl.constexpr):
    """What ``gradient_tile`` needs to know of channels; zeros for what there is not."""
    nothing = tl.zeros(channels.shape, tl.float32)
    centre, scale, offset, level, slope = nothing, nothing, nothing, nothing, nothing
    if bn_coeffs is not None:
        centre, scale, offset = affine_terms(mean, bn_coeffs, channels, inside, CHANNELS, dtype)
    if dy_coeffs is not None:
        slope = tl.load(dy_coeffs + channels, inside, 0.0)
        if dtype == tl.float32:
            level = tl.load(dy_coeffs + CHANNELS + channels, inside, 0.0)
        else:
            level = tl.load(dy_coeffs + 2 * CHANNELS + channels, inside, 0.0)
    return centre, scale, offset, level, slope


@triton.jit
def masked_tile(g, mask, rows, row_inside, first, CHANNELS, BLOCK: tl.constexpr):
    """g, or what of it the mask bits let through, of BLOCK channels from ``first``; 0 outside."""
    channels = first + tl.arange(0, BLOCK)
    value = tile_of(g, rows, row_inside, channels, channels < CHANNELS, CHANNELS)
    if mask is not None:
        # Selected, not multiplied: what the ReLU held back may be infinite or NaN.
        value = tl.where(bits_tile(mask, rows, row_inside, first, CHANNELS, BLOCK), value, 0.0)
    return value


@triton.jit
def gradient_tile(
    g,
    mask,
    y,
    bn_coeffs,
    dy_coeffs,
    centre,
    scale,
    offset,
    level,
    slope,
    zero,
    rows,
    row_inside,
    first,
    CHANNELS,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """dy at the pixels ``rows``, BLOCK channels from ``first``, whose terms are given; ``PADDED`` as in ``activated``.

    zero: ``unknown_zero``.
    dy = dz scale - level - (y - mean) slope; of 16 bits two multiply-adds, as in ``normed``.
    """
    value = masked_tile(g, mask, rows, row_inside, first, CHANNELS, BLOCK)
    if bn_coeffs is not None:
        dz = value.to(tl.float32)
        if mask is None or dy_coeffs is not None:
            channels = first + tl.arange(0, BLOCK)
            seen = tile_of(y, rows, row_inside, channels, channels < CHANNELS, CHANNELS)
        if mask is None:
            dz = tl.where(normed(seen, centre, scale, offset) <= zero, 0.0, dz)
        if dy_coeffs is None:
            dy = dz * scale[None, :]
        elif value.dtype == tl.float32:
            dy = dz * scale[None, :] - level[None, :] - (seen - centre[None, :]) * slope[None, :]
        else:
            dy = dz * scale[None, :] - (seen.to(tl.float32) * slope[None, :] + level[None, :])
        if PADDED:
            dy *= row_inside.to(tl.float32)[:, None]
        value = dy.to(value.dtype)
    return value


@triton.jit
def pixel_of(rows, HEIGHT, WIDTH):
    """Image, row and column of pixels that are counted through images of HEIGHT x WIDTH."""
    line = rows // WIDTH
    return line // HEIGHT, line % HEIGHT, rows % WIDTH


@triton.jit
def pixels_later(image, h, w, more_images, more_h, more_w, HEIGHT, WIDTH):
    """``pixel_of`` of pixels that are later by so many images, rows and columns; divides nothing."""
    w += more_w
    over = (w >= WIDTH).to(tl.int32)
    w -= over * WIDTH
    h += more_h + over
    over = (h >= HEIGHT).to(tl.int32)
    return image + more_images + over, h - over * HEIGHT, w


@triton.jit
def taps_inside(first, DILATION, SIZE, TAPS: tl.constexpr):
    """A bit for each of up to 31 taps, from ``first`` on: whether it is within 0 .. SIZE - 1."""
    seen = tl.zeros_like(first)
    for tap in tl.static_range(TAPS):
        at = first + tap * DILATION
        seen |= ((at >= 0) & (at < SIZE)).to(tl.int32) << tap
    return seen


@triton.jit
def next_step(r, s, first, CHANNELS, TAPS_W, BLOCK: tl.constexpr):
    """Row and column of the tap and the first channel of a loop's next step: counted, since divisions take longer."""
    first += BLOCK
    tap_done = first >= CHANNELS
    first = tl.where(tap_done, 0, first)
    s = tl.where(tap_done, s + 1, s)
    row_done = s == TAPS_W
    return tl.where(row_done, r + 1, r), tl.where(row_done, 0, s), first


@triton.jit
def store_tile_sums(da, value, mean, bn_coeffs, sums, tile, tiles, whole, channels, CHANNELS):
    """The sums over a tile's pixels of dz and of dz * (y - mean), dz = da behind relu(bn(y)), for ``sum_tiles``.

    ``value``: the tile of y as it was loaded; ``whole``: which elements are inside.
    """
    channel_inside = channels < CHANNELS
    centre, scale, offset = affine_terms(mean, bn_coeffs, channels, channel_inside, CHANNELS, value.dtype)
    dz = tl.where((normed(value, centre, scale, offset) <= 0) | ~whole, 0.0, da)
    place = sums + channels * tiles + tile
    tl.store(place, tl.sum(dz, 0), channel_inside)
    centred = value.to(tl.float32) - tl.load(mean + channels, channel_inside, 0.0)[None, :]
    tl.store(place + CHANNELS * tiles, tl.sum(dz * centred, 0), channel_inside)
