// The stem's kernels: relu(bn(y)) under a 3x3 max-pooling of stride 2 and padding 1.
//   channels_last: a thread handles eight channels of a pixel; a block a line of pixels at a time;
//   contiguous:    a thread handles a pixel; a block a plane at a time.
// Window (oh, ow) covers the input pixels (2*oh-1+kh, 2*ow-1+kw), so input row ih lies in the windows from
// ih/2 to (ih+1)/2, at kh = ih+1-2*oh.
#pragma once

#include "reduce.cuh"

namespace resnet_fused::cuda {

// The extents of an image and of its pooled output.
struct PoolShape {
  int64_t batch, channels;
  int height, width, pooled_height, pooled_width;

  explicit PoolShape(const Image& y)
      : batch(y.batch),
        channels(y.channels),
        height(static_cast<int>(y.height)),
        width(static_cast<int>(y.width)),
        pooled_height(static_cast<int>(y.pooled_height())),
        pooled_width(static_cast<int>(y.pooled_width())) {}

  // As unsigned numbers, those before the first are beyond the last.
  __device__ bool contains(int row, int column) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(column) < static_cast<unsigned>(width);
  }
};

template <typename T>
struct PoolForward {
  const T* y;
  T* out;
  uint8_t* indices;
  NormVectors<Stat<T>> norm;
};

template <typename T>
struct PoolReduce {
  const T* grad;
  const uint8_t* indices;
  const T* y;
  const Stat<T>* mean;
};

template <typename T>
struct PoolBackward {
  const T* grad;
  const uint8_t* indices;
  const T* y;
  T* dy;
  GradientVectors<Stat<T>> gradient;
};

// The first maximum of relu(z) wins, a NaN always does: what max_pool2d makes of it.
template <typename S>
__device__ inline void take_maximum(S z, uint32_t tap, S& best, uint32_t& index) {
  if (z > best || z != z) best = z, index = tap;
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    pool_columns_kernel(PoolForward<T> op, PoolShape s, int64_t tiles) {
  using S = Stat<T>;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Columns<kVector> at(tile, s.channels);
    if (!at.any()) continue;
    Affine<S> affine[kLanes];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) affine[j] = op.norm.affine(at.has(j) ? at[j] : 0);

    for (int64_t line = blockIdx.x; line < s.batch * s.pooled_height; line += gridDim.x) {
      const int64_t image = line / s.pooled_height;
      const int oh = static_cast<int>(line % s.pooled_height);
      for (int ow = threadIdx.y; ow < s.pooled_width; ow += blockDim.y) {
        S best[kLanes] = {};
        uint32_t index[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) index[j] = kNoGradient;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          const int ih = 2 * oh - 1 + tap / 3, iw = 2 * ow - 1 + tap % 3;
          if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
          Lanes<T, kVector> in;
          in.load(op.y + ((image * s.height + ih) * s.width + iw) * s.channels, at);
#pragma unroll
          for (int j = 0; j < kLanes; ++j) take_maximum<S>(affine[j](in.get(j)), tap, best[j], index[j]);
        }
        const int64_t pixel = (line * s.pooled_width + ow) * s.channels;
        Lanes<T, kVector> out;
#pragma unroll
        for (int j = 0; j < kLanes; ++j) out.set(j, best[j]);
        out.store(op.out + pixel, at);
        store_bytes<kVector>(op.indices + pixel, at, index);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pool_planes_kernel(PoolForward<T> op, PoolShape s) {
  using S = Stat<T>;
  for (int64_t plane = blockIdx.x; plane < s.batch * s.channels; plane += gridDim.x) {
    const Affine<S> affine = op.norm.affine(plane % s.channels);
    const T* y = op.y + plane * s.height * s.width;
    for (int oh = threadIdx.y; oh < s.pooled_height; oh += blockDim.y) {
      for (int ow = threadIdx.x; ow < s.pooled_width; ow += blockDim.x) {
        S best = 0;
        uint32_t index = kNoGradient;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          const int ih = 2 * oh - 1 + tap / 3, iw = 2 * ow - 1 + tap % 3;
          if (ih < 0 || ih >= s.height || iw < 0 || iw >= s.width) continue;
          take_maximum<S>(affine(widen(y[int64_t{ih} * s.width + iw])), tap, best, index);
        }
        const int64_t pixel = (plane * s.pooled_height + oh) * s.pooled_width + ow;
        narrow(best, op.out[pixel]);
        op.indices[pixel] = static_cast<uint8_t>(index);
      }
    }
  }
}

// Sums over the windows instead of the pixels: each window's gradient goes to the one pixel that its index
// names.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<false>)
    pool_reduce_columns_kernel(PoolReduce<T> op, PoolShape s, int64_t tiles, Stat<T>* partials) {
  using S = Stat<T>;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Columns<kVector> at(tile, s.channels);
    S mean[kLanes], sums[2][kLanes] = {};
#pragma unroll
    for (int j = 0; j < kLanes; ++j) mean[j] = __ldg(op.mean + (at.has(j) ? at[j] : 0));

    for (int64_t line = blockIdx.x; line < s.batch * s.pooled_height && at.any(); line += gridDim.x) {
      const int64_t image = line / s.pooled_height;
      const int oh = static_cast<int>(line % s.pooled_height);
      for (int ow = threadIdx.y; ow < s.pooled_width; ow += blockDim.y) {
        const int64_t pixel = (line * s.pooled_width + ow) * s.channels;
        Lanes<T, kVector> grad;
        uint32_t index[kLanes];
        grad.load(op.grad + pixel, at);
        load_bytes<kVector>(op.indices + pixel, at, index);
        S y[kLanes];
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const int ih = 2 * oh - 1 + static_cast<int>(index[j] / 3),
                    iw = 2 * ow - 1 + static_cast<int>(index[j] % 3);
          if (!s.contains(ih, iw)) index[j] = kNoGradient;
          const bool selected = index[j] < kNoGradient && at.has(j);
          y[j] =
              selected ? widen(op.y[((image * s.height + ih) * s.width + iw) * s.channels + at[j]]) : mean[j];
        }
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const S dz = index[j] < kNoGradient ? grad.get(j) : S(0);
          sums[0][j] += dz;
          sums[1][j] += dz * (y[j] - mean[j]);
        }
      }
    }
    store_column_partials(sums, s.channels, kVector, at.first, partials);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_reduce_planes_kernel(PoolReduce<T> op, PoolShape s, Stat<T>* partials) {
  using S = Stat<T>;
  for (int64_t channel = blockIdx.y; channel < s.channels; channel += gridDim.y) {
    const S mean = __ldg(op.mean + channel);
    S sums[2][kLanes] = {};
    for (int64_t image = blockIdx.x; image < s.batch; image += gridDim.x) {
      const int64_t plane = image * s.channels + channel;
      const T* y = op.y + plane * s.height * s.width;
      S line_sums[2] = {};  // of this image: keeps the running sums short
      for (int oh = threadIdx.y; oh < s.pooled_height; oh += blockDim.y) {
        for (int ow = threadIdx.x; ow < s.pooled_width; ow += blockDim.x) {
          const int64_t pixel = (plane * s.pooled_height + oh) * s.pooled_width + ow;
          const int index = op.indices[pixel];
          const int ih = 2 * oh - 1 + index / 3, iw = 2 * ow - 1 + index % 3;
          if (index >= kNoGradient || !s.contains(ih, iw)) continue;
          const S dz = widen(op.grad[pixel]);
          line_sums[0] += dz;
          line_sums[1] += dz * (widen(y[int64_t{ih} * s.width + iw]) - mean);
        }
      }
      sums[0][0] += line_sums[0];
      sums[1][0] += line_sums[1];
    }
    store_plane_partials(sums, s.channels, channel, partials);
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    pool_backward_columns_kernel(PoolBackward<T> op, PoolShape s, int64_t tiles) {
  using S = Stat<T>;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Columns<kVector> at(tile, s.channels);
    if (!at.any()) continue;
    GradientCoefficients<S> coefficients[kLanes];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) coefficients[j] = op.gradient.coefficients(at.has(j) ? at[j] : 0);

    for (int64_t line = blockIdx.x; line < s.batch * s.height; line += gridDim.x) {
      const int64_t image = line / s.height;
      const int ih = static_cast<int>(line % s.height);
      for (int iw = threadIdx.y; iw < s.width; iw += blockDim.y) {
        const int64_t pixel = (line * s.width + iw) * s.channels;
        Lanes<T, kVector> y, dy;
        y.load(op.y + pixel, at);
        S dz[kLanes] = {};
// Four windows' scalar loads at once would not fit into the registers.
#pragma unroll(kVector ? 4 : 1)
        for (int window = 0; window < 4; ++window) {
          const int oh = ih / 2 + window / 2, ow = iw / 2 + window % 2;
          if (oh > (ih + 1) / 2 || ow > (iw + 1) / 2 || oh >= s.pooled_height || ow >= s.pooled_width)
            continue;
          const uint32_t tap = (ih + 1 - 2 * oh) * 3 + (iw + 1 - 2 * ow);
          const int64_t pooled = ((image * s.pooled_height + oh) * s.pooled_width + ow) * s.channels;
          Lanes<T, kVector> grad;
          uint32_t index[kLanes];
          grad.load(op.grad + pooled, at);
          load_bytes<kVector>(op.indices + pooled, at, index);
#pragma unroll
          for (int j = 0; j < kLanes; ++j) dz[j] += index[j] == tap ? grad.get(j) : S(0);
        }
#pragma unroll
        for (int j = 0; j < kLanes; ++j) dy.set(j, op.gradient(coefficients[j], dz[j], y.get(j)));
        dy.store(op.dy + pixel, at);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<false>)
    pool_backward_planes_kernel(PoolBackward<T> op, PoolShape s) {
  using S = Stat<T>;
  for (int64_t plane = blockIdx.x; plane < s.batch * s.channels; plane += gridDim.x) {
    const GradientCoefficients<S> coefficients = op.gradient.coefficients(plane % s.channels);
    for (int ih = threadIdx.y; ih < s.height; ih += blockDim.y) {
      for (int iw = threadIdx.x; iw < s.width; iw += blockDim.x) {
        S dz = 0;
#pragma unroll
        for (int window = 0; window < 4; ++window) {
          const int oh = ih / 2 + window / 2, ow = iw / 2 + window % 2;
          if (oh > (ih + 1) / 2 || ow > (iw + 1) / 2 || oh >= s.pooled_height || ow >= s.pooled_width)
            continue;
          const int64_t pooled = (plane * s.pooled_height + oh) * s.pooled_width + ow;
          if (op.indices[pooled] == (ih + 1 - 2 * oh) * 3 + (iw + 1 - 2 * ow)) dz += widen(op.grad[pooled]);
        }
        const int64_t pixel = (plane * s.height + ih) * s.width + iw;
        narrow(op.gradient(coefficients, dz, widen(op.y[pixel])), op.dy[pixel]);
      }
    }
  }
}

}  // namespace resnet_fused::cuda
