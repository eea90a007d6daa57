// float16 for the emulation: conversions only.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }

inline float __half2float(__half v) {
  const int exponent = (v.bits >> 10) & 0x1f, fraction = v.bits & 0x3ff;
  float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024),
                               (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 0x1f) magnitude = fraction == 0 ? INFINITY : NAN;
  return (v.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// To nearest, ties to even.
inline __half __float2half_rn(float v) {
  const uint16_t sign = static_cast<uint16_t>((__float_as_uint(v) >> 16) & 0x8000);
  const float magnitude = std::fabs(v);
  if (v != v) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -13;  // of the smallest normal number
  if (magnitude > 0x1p-14f) std::frexp(magnitude, &exponent);
  // In units of the last place; rounding up to the next power of two carries into the exponent by itself.
  const int place = exponent - 11;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -place)));
  const int biased = place + 24;  // 0 for subnormals and for the smallest normals
  return {static_cast<uint16_t>(sign | (biased * 1024 + units))};
}
