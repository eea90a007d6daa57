// Elements: the four dtypes, and eight elements of a row as one thread loads and stores them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "launch.cuh"

namespace resnet_fused::cuda {

// Bits only: arithmetic is in the statistics type, so the vendor's operators are not wanted.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct StatOf {
  using type = float;
};
template <>
struct StatOf<double> {
  using type = double;
};
template <typename T>
using Stat = typename StatOf<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ inline float widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }

__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ inline void narrow(float v, Half& to) { to.bits = __half_as_ushort(__float2half_rn(v)); }

// Calls f with a null pointer of the element type.
template <class F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::f64:
      return f(static_cast<double*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<BFloat16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<Half*>(nullptr));
  }
  throw std::runtime_error("resnet_fused: unknown dtype");
}

// float64 is there for checking, not for speed: its vector kernels are not worth compiling.
template <typename T>
constexpr bool kHasVectorPath = sizeof(T) <= 4;

// The columns of a thread's eight elements within a tile of blockDim.x * 8. With 16-byte accesses they are
// neighbours; without, they lie blockDim.x apart, so that the threads of a warp still touch neighbours.
template <bool kVector>
struct Columns {
  int64_t first, end;  // end: columns of the matrix

  __device__ Columns(int64_t tile, int64_t end)
      : first(kVector ? (tile * blockDim.x + threadIdx.x) * kLanes
                      : tile * blockDim.x * kLanes + threadIdx.x),
        end(end) {}
  __device__ int64_t operator[](int j) const {
    return kVector ? first + j : first + j * static_cast<int>(blockDim.x);
  }
  __device__ bool any() const { return first < end; }
  __device__ bool has(int j) const { return kVector ? any() : (*this)[j] < end; }
};

template <typename T, bool kVector>
struct Lanes;

// Kept as raw words until used: half the registers of floats, so more loads can be in flight.
template <typename T>
struct Lanes<T, true> {
  uint32_t words[sizeof(T) * 2];

  __device__ void load(const T* row, const Columns<true>& at) {
    const uint4* from = reinterpret_cast<const uint4*>(row + at.first);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      const uint4 v = from[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
  __device__ void store(T* row, const Columns<true>& at) const {
    uint4* to = reinterpret_cast<uint4*>(row + at.first);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i) {
      // An assignment would do, but the compiler splits some of those into four.
      __stwb(to + i, make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
    }
  }
  __device__ float get(int j) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[j]);
    } else {
      return widen(T{static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)))});
    }
  }
  // In ascending order of j: an even element clears its word's other half.
  __device__ void set(int j, float v) {
    if constexpr (sizeof(T) == 4) {
      words[j] = __float_as_uint(v);
    } else {
      T narrowed;
      narrow(v, narrowed);
      words[j / 2] = j % 2 == 0 ? narrowed.bits : words[j / 2] | static_cast<uint32_t>(narrowed.bits) << 16;
    }
  }
};

template <typename T>
struct Lanes<T, false> {
  T values[kLanes];

  __device__ void load(const T* row, const Columns<false>& at) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) values[j] = at.has(j) ? row[at[j]] : T{};
  }
  __device__ void store(T* row, const Columns<false>& at) const {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (at.has(j)) row[at[j]] = values[j];
    }
  }
  __device__ Stat<T> get(int j) const { return widen(values[j]); }
  __device__ void set(int j, Stat<T> v) { narrow(v, values[j]); }
};

// Eight bytes of a row, for the indices of the max-pooling.
template <bool kVector>
__device__ inline void load_bytes(const uint8_t* row, const Columns<kVector>& at, uint32_t (&bytes)[kLanes]) {
  if constexpr (kVector) {
    const uint2 v = *reinterpret_cast<const uint2*>(row + at.first);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) bytes[j] = ((j < 4 ? v.x : v.y) >> (8 * (j % 4))) & 0xffu;
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) bytes[j] = at.has(j) ? row[at[j]] : kNoGradient;
  }
}

template <bool kVector>
__device__ inline void store_bytes(uint8_t* row, const Columns<kVector>& at,
                                   const uint32_t (&bytes)[kLanes]) {
  if constexpr (kVector) {
    *reinterpret_cast<uint2*>(row + at.first) =
        make_uint2(bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24,
                   bytes[4] | bytes[5] << 8 | bytes[6] << 16 | bytes[7] << 24);
  } else {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (at.has(j)) row[at[j]] = static_cast<uint8_t>(bytes[j]);
    }
  }
}

// Bit j of the result belongs to the thread's element j.
template <bool kVector>
__device__ inline uint32_t load_mask(const uint8_t* row, const Columns<kVector>& at) {
  if constexpr (kVector) {
    return row[at.first / kLanes];
  } else {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      if (at.has(j)) bits |= ((row[at[j] / 8] >> (at[j] % 8)) & 1u) << j;
    }
    return bits;
  }
}

}  // namespace resnet_fused::cuda
