// The element types of an activation and their statistics types. Conversions are integer and float arithmetic
// without branches, so that a loop over them becomes vectors on every machine.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../kernels.h"
#include "isa.h"

namespace resnet_fused::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
struct StatOf {
  using type = float;
};
template <>
struct StatOf<double> {
  using type = double;
};
template <class T>
using Stat = typename StatOf<T>::type;

// An integer as wide as a statistic, so that both fill a vector in the same number of lanes.
template <class S>
using Lane = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;

RESNET_FUSED_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

RESNET_FUSED_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

RESNET_FUSED_INLINE float load(float x) { return x; }
RESNET_FUSED_INLINE double load(double x) { return x; }
RESNET_FUSED_INLINE float load(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

RESNET_FUSED_INLINE float load(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);   // the biases of the exponents differ by 112
  const uint32_t special = shifted + (224u << 23);  // infinity and NaN: exponent 31 becomes 255
  // A subnormal counts in steps of 2^-24, which is the last place of 0.5f.
  const uint32_t subnormal = bits_of(float_of(magnitude | 0x3f000000u) - 0.5f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of((magnitude >= 0x7c00u ? special : finite) | sign);
}

// Round to nearest even; a NaN stays one.
template <class T>
RESNET_FUSED_INLINE T store(Stat<T> x);

template <>
RESNET_FUSED_INLINE float store<float>(float x) {
  return x;
}

template <>
RESNET_FUSED_INLINE double store<double>(double x) {
  return x;
}

template <>
RESNET_FUSED_INLINE BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}

template <>
RESNET_FUSED_INLINE Half store<Half>(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // rounds to 2^-24
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t number = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // 65520 and above round to infinity
  return {uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : number))};
}

// Calls body(T{}) for the element type that dtype names.
template <class Body>
void dispatch(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(BFloat16{});
    case Dtype::f16:
      return body(Half{});
  }
}

}  // namespace resnet_fused::cpu
