// One pass over a matrix: any number of inputs and outputs of its shape, per-channel coefficients, and a
// ReLU mask that is read or written. An Op says what happens to one element:
//
//   Element                              element type
//   kInputs, kOutputs                    how many activations it reads and writes
//   kReadsMask, kWritesMask
//   inputs[], outputs[]                  their pointers; mask_in, mask_out where the flags say so
//   Coefficients, coefficients(c)        what it needs to know of channel c
//   bool apply(k, in[], active, out[])     active: the element's bit of mask_in; returns that of mask_out
#pragma once

#include "elements.cuh"
#include "norm.cuh"

namespace resnet_fused::cuda {

// Without 16-byte accesses a thread's elements are not the neighbours that share a mask byte, so the block
// collects its bits in shared memory first. Every thread of the block has to come here.
__device__ inline void store_mask_of_block(uint8_t* row, bool row_exists, const Columns<false>& at,
                                           int64_t tile, int64_t bytes_per_row, uint32_t bits) {
  __shared__ uint8_t active[kThreads * kLanes];
  const int width = blockDim.x;
  uint8_t* active_of_row = active + threadIdx.y * width * kLanes;
#pragma unroll
  for (int j = 0; j < kLanes; ++j)
    active_of_row[threadIdx.x + j * width] = (bits >> j) & (at.has(j) ? 1u : 0u);
  __syncthreads();
  const int64_t byte = tile * width + threadIdx.x;
  if (row_exists && byte < bytes_per_row) {
    uint32_t packed = 0;
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      packed |= static_cast<uint32_t>(active_of_row[threadIdx.x * kLanes + j]) << j;
    row[byte] = static_cast<uint8_t>(packed);
  }
  __syncthreads();
}

// The grid's x goes over blocks of rows, its y over tiles of columns. The channel is the column for
// channels_last and hangs on the row otherwise; the loop over the other one is the inner one, so that the
// coefficients stay in registers.
template <class Op, bool kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<kVector>)
    elementwise_kernel(Op op, Matrix shape, int64_t tiles) {
  using T = typename Op::Element;
  using S = Stat<T>;
  // 32 bytes of each input in flight, unless three inputs and their coefficients then leave a multiprocessor
  // with registers for one block only.
  constexpr int kBatch = kVector && sizeof(T) == 2 && Op::kInputs < 3 ? 2 : 1;

  const int64_t row_blocks = ceil_div(shape.rows, blockDim.y);
  const int64_t mask_bytes = (shape.cols + 7) / 8;
  const int64_t outer_end = kChannelsLast ? tiles : row_blocks,
                inner_end = kChannelsLast ? row_blocks : tiles;
  const int64_t outer_step = kChannelsLast ? gridDim.y : gridDim.x;
  const int64_t inner_step = kChannelsLast ? gridDim.x : gridDim.y;

  for (int64_t outer = kChannelsLast ? blockIdx.y : blockIdx.x; outer < outer_end; outer += outer_step) {
    typename Op::Coefficients coefficients[kChannelsLast ? kLanes : 1];
    if constexpr (kChannelsLast) {
      const Columns<kVector> at(outer, shape.cols);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) coefficients[j] = op.coefficients(at.has(j) ? at[j] : 0);
    } else {
      const int64_t row = outer * blockDim.y + threadIdx.y;
      coefficients[0] = op.coefficients(row % shape.channels);
    }

    for (int64_t inner = kChannelsLast ? blockIdx.x : blockIdx.y; inner < inner_end;
         inner += kBatch * inner_step) {
      Lanes<T, kVector> in[kBatch][Op::kInputs];
      uint32_t active_bits[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = inner + b * inner_step;
        const int64_t row = (kChannelsLast ? i : outer) * blockDim.y + threadIdx.y;
        const Columns<kVector> at(kChannelsLast ? outer : i, shape.cols);
        active_bits[b] = 0;
        if (row < shape.rows && at.any()) {
#pragma unroll
          for (int n = 0; n < Op::kInputs; ++n) in[b][n].load(op.inputs[n] + row * shape.cols, at);
          if constexpr (Op::kReadsMask) active_bits[b] = load_mask(op.mask_in + row * mask_bytes, at);
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = inner + b * inner_step;
        const int64_t tile = kChannelsLast ? outer : i;
        const int64_t row = (kChannelsLast ? i : outer) * blockDim.y + threadIdx.y;
        const Columns<kVector> at(tile, shape.cols);
        const bool exists = row < shape.rows && at.any();
        uint32_t active_lanes = 0;
        if (exists) {
          Lanes<T, kVector> out[Op::kOutputs];
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            S from[Op::kInputs], to[Op::kOutputs];
#pragma unroll
            for (int n = 0; n < Op::kInputs; ++n) from[n] = in[b][n].get(j);
            const bool is_active =
                op.apply(coefficients[kChannelsLast ? j : 0], from, (active_bits[b] >> j) & 1u, to);
            active_lanes |= (is_active ? 1u : 0u) << j;
#pragma unroll
            for (int n = 0; n < Op::kOutputs; ++n) out[n].set(j, to[n]);
          }
#pragma unroll
          for (int n = 0; n < Op::kOutputs; ++n) out[n].store(op.outputs[n] + row * shape.cols, at);
        }
        if constexpr (Op::kWritesMask && kVector) {
          if (exists) op.mask_out[row * mask_bytes + at.first / kLanes] = static_cast<uint8_t>(active_lanes);
        } else if constexpr (Op::kWritesMask) {
          store_mask_of_block(op.mask_out + row * mask_bytes, row < shape.rows, at, tile, mask_bytes,
                              active_lanes);
        }
      }
    }
  }
}

template <class Op>
bool can_use_vectors(const Op& op, int64_t cols) {
  bool can = cols % kLanes == 0;
  for (const auto* pointer : op.inputs) can = can && aligned_to(pointer, 16);
  for (const auto* pointer : op.outputs) can = can && aligned_to(pointer, 16);
  return can;
}

template <class Op>
void launch_elementwise(const char* name, const Op& op, const Matrix& shape, Launch where) {
  if (shape.rows == 0 || shape.cols == 0) return;
  // Narrow tiles where the channel is the column: a block's rows then share its coefficients in L1.
  const Tiles tiles = split_evenly(ceil_div(shape.cols, kLanes), shape.channels_last ? 64 : kThreads);
  const int64_t rows_per_block = std::min<int64_t>(kThreads / tiles.width, shape.rows);
  const int64_t row_blocks = ceil_div(shape.rows, rows_per_block);
  const int64_t pieces = pieces_per_block(row_blocks * tiles.count);
  const dim3 block(tiles.width, static_cast<unsigned>(rows_per_block));
  const dim3 grid = shape.channels_last ? make_grid(ceil_div(row_blocks, pieces), tiles.count)
                                        : make_grid(row_blocks, ceil_div(tiles.count, pieces));
  const auto run = [&](auto kernel) {
    launch(name, kernel, grid, block, where.stream, op, shape, tiles.count);
  };
  if constexpr (kHasVectorPath<typename Op::Element>) {
    if (can_use_vectors(op, shape.cols)) {
      return shape.channels_last ? run(&elementwise_kernel<Op, true, true>)
                                 : run(&elementwise_kernel<Op, true, false>);
    }
  }
  shape.channels_last ? run(&elementwise_kernel<Op, false, true>)
                      : run(&elementwise_kernel<Op, false, false>);
}

}  // namespace resnet_fused::cuda
