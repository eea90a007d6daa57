// Vectors of float, by the compiler's vector extension: the same source becomes AVX-512, AVX2 or NEON
// instructions. Included by one translation unit for each instruction set (isa_*.cpp), inside its namespace.
//
//   kLanes    floats in a vector
//   kRows     rows of A that a GEMM kernel keeps in registers
//   kPanel    columns of B that it keeps in registers: two vectors

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

RESNET_FUSED_INLINE Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
RESNET_FUSED_INLINE void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }

// The first n elements; the others are zero.
RESNET_FUSED_INLINE Vec load(const float* from, int n) {
  if (n >= kLanes) return load(from);
  float values[kLanes] = {};
  __builtin_memcpy(values, from, sizeof(float) * (n % kLanes));
  return load(values);
}

RESNET_FUSED_INLINE void store(float* to, Vec value, int n) {
  if (n >= kLanes) return store(to, value);
  float values[kLanes];
  store(values, value);
  __builtin_memcpy(to, values, sizeof(float) * (n % kLanes));
}

// As PyTorch's ReLU lets NaN through.
RESNET_FUSED_INLINE Vec relu(Vec z) { return z <= 0 ? Vec{} : z; }

// A vector whose lane i is not zero where bit `first` + i of a row of a mask is set, for i < n.
RESNET_FUSED_INLINE IntVec mask_lanes(const uint8_t* row, int64_t first, int n) {
  uint32_t bits = 0;
  for (int i = 0; 8 * i < n; i++) bits |= uint32_t(row[first / 8 + i]) << (8 * i);
  if (kLanes < 8) bits >>= first % 8;
  IntVec flags;
  for (int i = 0; i < kLanes; i++) flags[i] = 1 << i;
  return (flags & int32_t(bits)) != 0;
}

template <int D>
RESNET_FUSED_INLINE void exchange(Vec (&rows)[kLanes]) {
  IntVec upper{}, lower{};
  for (int i = 0; i < kLanes; i++) {
    upper[i] = i & D ? kLanes + i - D : i;
    lower[i] = i & D ? kLanes + i : i + D;
  }
  RESNET_FUSED_UNROLL
  for (int i = 0; i < kLanes; i++)
    if ((i & D) == 0) {
      const Vec a = rows[i], b = rows[i + D];
#if defined(__clang__)
      for (int j = 0; j < kLanes; j++) {
        rows[i][j] = upper[j] < kLanes ? a[upper[j]] : b[upper[j] - kLanes];
        rows[i + D][j] = lower[j] < kLanes ? a[lower[j]] : b[lower[j] - kLanes];
      }
#else
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + D] = __builtin_shuffle(a, b, lower);
#endif
    }
  if constexpr (D > 1) exchange<D / 2>(rows);
}

// rows[i][j] becomes rows[j][i].
RESNET_FUSED_INLINE void transpose(Vec (&rows)[kLanes]) { exchange<kLanes / 2>(rows); }
