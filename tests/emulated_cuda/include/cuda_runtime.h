// Stands in for the CUDA toolkit's header when g++ compiles the kernels: blocks run one after another, the
// threads of a block as fibers that change places at __syncthreads().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stwb(T* pointer, T value) {
  *pointer = value;
}

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t v) { return emulated_bits<float>(v); }
inline uint32_t __float_as_uint(float v) { return emulated_bits<uint32_t>(v); }

// Throws std::runtime_error where CUDA would refuse the launch or where the threads of a block do not agree
// on a barrier.
void emulate(dim3 grid, dim3 block, const std::function<void()>& thread);

template <typename Kernel, typename... Arguments>
void emulated_launch(Kernel kernel, dim3 grid, dim3 block, cudaStream_t, const Arguments&... arguments) {
  emulate(grid, block, [&] { kernel(arguments...); });
}
