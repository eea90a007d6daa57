// Launching: block shapes, grid sizes, and errors that name the kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace resnet_fused::cuda {

constexpr int kThreads = 256;  // the most a block may have
constexpr int kLanes = 8;      // elements a thread handles at a time: one byte of the mask

// Of an H100; other devices are cut up the same way, so that a result does not depend on the device. The
// tests emulate a smaller one, where small tensors already make the kernels loop.
#ifndef RESNET_FUSED_MULTIPROCESSORS
#define RESNET_FUSED_MULTIPROCESSORS 132
#endif
constexpr int64_t kMultiprocessors = RESNET_FUSED_MULTIPROCESSORS;
constexpr int64_t kFullGrid = kMultiprocessors * 8;  // blocks that keep a device busy
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

// Without a least number of blocks the compiler aims at an occupancy of its own choice, at times at the price
// of spilling a few registers, which the scalar kernels' longer addressing brings about. 0: no such number.
template <bool kVector>
constexpr int kLeastBlocks = kVector ? 0 : 1;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count` places split into equal tiles of at most `limit`: 98 places under a limit of 64 are two tiles
// of 49, so that no thread of the last tile idles.
struct Tiles {
  int64_t count;
  int width;
};

inline Tiles split_evenly(int64_t count, int64_t limit) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(count, limit));
  return {tiles, static_cast<int>(std::max<int64_t>(1, ceil_div(count, tiles)))};
}

// How many of `work` equal pieces one block should take: enough to pay for loading its coefficients, but
// not so many that the grid no longer fills the device.
inline int64_t pieces_per_block(int64_t work) { return std::clamp<int64_t>(work / kFullGrid, 1, 16); }

inline dim3 make_grid(int64_t x, int64_t y) {
  return dim3(static_cast<unsigned>(std::min(x, kMaxGridX)), static_cast<unsigned>(std::min(y, kMaxGridY)));
}

inline bool aligned_to(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
            const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else  // the tests' emulation, which has no launch syntax
  emulated_launch(kernel, grid, block, stream, arguments...);
#endif
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("resnet_fused: CUDA kernel ") + name +
                             " did not launch: " + cudaGetErrorString(error));
  }
}

}  // namespace resnet_fused::cuda
