// Sums over the pixels of each channel, without atomics, so that a result depends on nothing but its input:
// each block leaves one partial result per channel in the workspace, and a second kernel adds those up in a
// fixed order. An Op says what is summed:
//
//   Element, kInputs, inputs[], kReadsMask, mask_in, Coefficients, coefficients(c)   as in elementwise.cuh
//   kSums                                                                           how many sums
//   terms(k, in[], active, t[])                                                       one element's terms
//   Totals totals                                                                   where the sums go
#pragma once

#include "elements.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {

// Blocks of the first kernel, all channels together: four on each multiprocessor. More would only
// give the second kernel more to add up.
constexpr int64_t kReduceBlocks = kMultiprocessors * 4;
constexpr int kMaxSums = 3;
// Columns of a channels_last tile: 256 bytes of bf16 in a row, and at least 16 rows to a block.
constexpr int64_t kReduceTile = 16;

// At most this many partial results a channel, in either layout.
inline int64_t max_chunks(int64_t channels) {
  return std::max<int64_t>(1, kReduceBlocks / std::max<int64_t>(1, ceil_div(channels, kReduceTile * kLanes)));
}

// How the first kernel is cut up. A chunk is what one block reads of one tile of channels (channels_last)
// or of one channel (contiguous).
struct ReducePlan {
  Tiles tiles;  // of the columns
  int rows_per_block;
  int64_t chunks;

  dim3 block() const { return dim3(tiles.width, rows_per_block); }
};

inline ReducePlan plan_reduce(const Matrix& shape) {
  const int64_t packs = ceil_div(shape.cols, kLanes);
  // Rows that one block can share out among its threads: all of them, or those of one channel.
  const int64_t rows = shape.channels_last ? shape.rows : shape.rows / shape.channels;
  const Tiles tiles = split_evenly(packs, shape.channels_last ? kReduceTile : kThreads);
  const int64_t rows_per_block = std::min<int64_t>(kThreads / tiles.width, rows);
  const int64_t row_blocks = ceil_div(rows, rows_per_block);
  const int64_t work = shape.channels_last ? row_blocks : row_blocks * tiles.count;
  const int64_t wanted = shape.channels_last ? max_chunks(shape.channels) : kReduceBlocks / shape.channels;
  return {tiles, static_cast<int>(rows_per_block), std::clamp<int64_t>(wanted, 1, work)};
}

// Blocks of one channel's rows and tiles of its columns, dealt out to the chunks in turn: a walk over
// (row block, tile) in steps of `chunks` that needs no division after the first.
struct PlaneWalk {
  int64_t row_block, tile, tiles, step_rows, step_tiles;

  __device__ PlaneWalk(int64_t chunk, int64_t chunks, int64_t tiles)
      : row_block(chunk / tiles),
        tile(chunk % tiles),
        tiles(tiles),
        step_rows(chunks / tiles),
        step_tiles(chunks % tiles) {}
  __device__ void advance() {
    row_block += step_rows;
    tile += step_tiles;
    if (tile >= tiles) tile -= tiles, ++row_block;
  }
};

// partials[chunk][sum][channel]
template <typename S, int kSums>
__device__ void store_column_partials(const S (&sums)[kSums][kLanes], int64_t channels, bool vector,
                                      int64_t first_channel, S* partials) {
  __shared__ S scratch[kLanes][kThreads];
  const int width = blockDim.x, thread = threadIdx.y * width + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) scratch[j][thread] = sums[k][j];
    __syncthreads();
    for (int rows = blockDim.y; rows > 1;) {
      const int half = (rows + 1) / 2;
      if (static_cast<int>(threadIdx.y) + half < rows) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) scratch[j][thread] += scratch[j][thread + half * width];
      }
      rows = half;
      __syncthreads();
    }
    if (threadIdx.y == 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const int64_t channel = first_channel + (vector ? j : j * width);
        if (channel < channels)
          partials[(blockIdx.x * int64_t{kSums} + k) * channels + channel] = scratch[j][thread];
      }
    }
    __syncthreads();
  }
}

template <typename S, int kSums>
__device__ void store_plane_partials(const S (&sums)[kSums][kLanes], int64_t channels, int64_t channel,
                                     S* partials) {
  __shared__ S scratch[kSums][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const S(&s)[kLanes] = sums[k];
    scratch[k][thread] = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }
  __syncthreads();
  for (int count = blockDim.x * blockDim.y; count > 1;) {
    const int half = (count + 1) / 2;
    if (thread + half < count) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) scratch[k][thread] += scratch[k][thread + half];
    }
    count = half;
    __syncthreads();
  }
  if (thread == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k)
      partials[(blockIdx.x * int64_t{kSums} + k) * channels + channel] = scratch[k][0];
  }
  __syncthreads();
}

template <class Op, class Coefficients, bool kVector, int kBatch>
__device__ void accumulate(const Op& op, const Coefficients* coefficients, int coefficient_step,
                           const Lanes<typename Op::Element, kVector> (&in)[kBatch][Op::kInputs],
                           const uint32_t (&active_bits)[kBatch], const bool (&exists)[kBatch],
                           Stat<typename Op::Element> (&sums)[Op::kSums][kLanes]) {
  using S = Stat<typename Op::Element>;
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    if (!exists[b]) continue;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      S from[Op::kInputs], terms[Op::kSums];
#pragma unroll
      for (int n = 0; n < Op::kInputs; ++n) from[n] = in[b][n].get(j);
      op.terms(coefficients[j * coefficient_step], from, (active_bits[b] >> j) & 1u, terms);
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) sums[k][j] += terms[k];
    }
  }
}

// Grid: chunks by tiles of channels.
template <class Op, bool kVector>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<kVector>)
    reduce_columns_kernel(Op op, Matrix shape, int64_t tiles, Stat<typename Op::Element>* partials) {
  using T = typename Op::Element;
  constexpr int kBatch = kVector && sizeof(T) == 2 ? 2 : 1;
  const int64_t mask_bytes = (shape.cols + 7) / 8, step = int64_t{gridDim.x} * blockDim.y;

  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Columns<kVector> at(tile, shape.cols);
    typename Op::Coefficients coefficients[kLanes];
    Stat<T> sums[Op::kSums][kLanes] = {};
#pragma unroll
    for (int j = 0; j < kLanes; ++j) coefficients[j] = op.coefficients(at.has(j) ? at[j] : 0);

    const int64_t first_row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    for (int64_t row = first_row; row < shape.rows && at.any(); row += kBatch * step) {
      Lanes<T, kVector> in[kBatch][Op::kInputs];
      uint32_t active_bits[kBatch];
      bool exists[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t r = row + b * step;
        exists[b] = r < shape.rows;
        active_bits[b] = 0;
        if (!exists[b]) continue;
#pragma unroll
        for (int n = 0; n < Op::kInputs; ++n) in[b][n].load(op.inputs[n] + r * shape.cols, at);
        if constexpr (Op::kReadsMask) active_bits[b] = load_mask(op.mask_in + r * mask_bytes, at);
      }
      accumulate(op, coefficients, 1, in, active_bits, exists, sums);
    }
    store_column_partials(sums, shape.cols, kVector, at.first, partials);
  }
}

// Grid: chunks by channels.
template <class Op, bool kVector>
__global__ void __launch_bounds__(kThreads)
    reduce_planes_kernel(Op op, Matrix shape, int64_t tiles, Stat<typename Op::Element>* partials) {
  using T = typename Op::Element;
  constexpr int kBatch = kVector && sizeof(T) == 2 ? 2 : 1;
  const int64_t mask_bytes = (shape.cols + 7) / 8, images = shape.rows / shape.channels;
  const int64_t row_blocks = ceil_div(images, blockDim.y);

  for (int64_t channel = blockIdx.y; channel < shape.channels; channel += gridDim.y) {
    const typename Op::Coefficients coefficients = op.coefficients(channel);
    Stat<T> sums[Op::kSums][kLanes] = {};

    PlaneWalk walk(blockIdx.x, gridDim.x, tiles);
    while (walk.row_block < row_blocks) {
      Lanes<T, kVector> in[kBatch][Op::kInputs];
      uint32_t active_bits[kBatch];
      bool exists[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t image = walk.row_block * blockDim.y + threadIdx.y;
        const int64_t row = image * shape.channels + channel;
        const Columns<kVector> at(walk.tile, shape.cols);
        exists[b] = image < images && at.any();
        active_bits[b] = 0;
        walk.advance();
        if (!exists[b]) continue;
#pragma unroll
        for (int n = 0; n < Op::kInputs; ++n) in[b][n].load(op.inputs[n] + row * shape.cols, at);
        if constexpr (Op::kReadsMask) active_bits[b] = load_mask(op.mask_in + row * mask_bytes, at);
      }
      accumulate(op, &coefficients, 0, in, active_bits, exists, sums);
    }
    store_plane_partials(sums, shape.channels, channel, partials);
  }
}

// Where the sums go: the merging kernel calls put(k, channel, total of sum k).
// The kernels sum dz * (y - mean); a factor of invstd is due at the end.
template <typename S, int kCount>
struct Totals {
  using Statistic = S;
  static constexpr int kSums = kCount;

  S* sums[kSums];
  const S* factors[kSums];  // null: one

  __device__ void put(int k, int64_t channel, double total) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (i != k) continue;
      const double factor = factors[i] == nullptr ? 1.0 : static_cast<double>(__ldg(factors[i] + channel));
      sums[i][channel] = static_cast<S>(total * factor);
    }
  }
};

// One sum, added to what is there.
template <typename S>
struct RunningTotal {
  using Statistic = S;
  static constexpr int kSums = 1;

  double* sum;

  __device__ void put(int, int64_t channel, double total) const { sum[channel] += total; }
};

// Eight channels, a 32-byte sector of the partials, by 32 lanes that share out the chunks.
constexpr int kMergeChannels = 8;
constexpr int kMergeLanes = kThreads / kMergeChannels;

template <class Target>
__global__ void __launch_bounds__(kThreads)
    merge_sums_kernel(const typename Target::Statistic* partials, int64_t channels, int64_t chunks,
                      Target totals) {
  __shared__ double scratch[kMergeLanes][kMergeChannels];
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x;
  const int k = blockIdx.y;
  double sum = 0;
  if (channel < channels) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kMergeLanes) {
      sum += partials[(chunk * Target::kSums + k) * channels + channel];
    }
  }
  scratch[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.y) < half) {
      scratch[threadIdx.y][threadIdx.x] += scratch[threadIdx.y + half][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && channel < channels) totals.put(k, channel, scratch[0][threadIdx.x]);
}

template <class Target>
void launch_merge_sums(const char* name, const Target& totals, int64_t channels, int64_t chunks,
                       Launch where) {
  const dim3 grid(static_cast<unsigned>(ceil_div(channels, kMergeChannels)), Target::kSums);
  launch(name, &merge_sums_kernel<Target>, grid, dim3(kMergeChannels, kMergeLanes), where.stream,
         static_cast<const typename Target::Statistic*>(where.workspace), channels, chunks, totals);
}

template <class Op>
void launch_reduce(const char* name, const Op& op, const Matrix& shape, Launch where) {
  using S = Stat<typename Op::Element>;
  if (shape.channels == 0) return;
  int64_t chunks = 0;
  if (shape.rows != 0 && shape.cols != 0) {
    const ReducePlan plan = plan_reduce(shape);
    chunks = plan.chunks;
    bool vector = kHasVectorPath<typename Op::Element> && shape.cols % kLanes == 0;
    for (const auto* pointer : op.inputs) vector = vector && aligned_to(pointer, 16);
    const dim3 grid = make_grid(chunks, shape.channels_last ? plan.tiles.count : shape.channels);
    const auto run = [&](auto kernel) {
      launch(name, kernel, grid, plan.block(), where.stream, op, shape, plan.tiles.count,
             static_cast<S*>(where.workspace));
    };
    if constexpr (kHasVectorPath<typename Op::Element>) {
      if (vector)
        shape.channels_last ? run(&reduce_columns_kernel<Op, true>) : run(&reduce_planes_kernel<Op, true>);
    }
    if (!vector)
      shape.channels_last ? run(&reduce_columns_kernel<Op, false>) : run(&reduce_planes_kernel<Op, false>);
  }
  launch_merge_sums(name, op.totals, shape.channels, chunks, where);
}

}  // namespace resnet_fused::cuda
