// What the translation units of the instruction sets share with the one that chooses between them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../kernels.h"
#include "../isa.h"
#include "../norm.h"
#include "../parallel.h"

namespace resnet_fused::cpu {

// Uninitialized floats, aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t elements);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();
  float* data() const { return data_; }

 private:
  float* data_;
  bool is_large_;
};

// Of this thread, until it asks again.
float* scratch(int64_t elements);

// Of a core's second-level cache.
int64_t cache_bytes();

// Up to which sums of a weight's gradient are taken over kParts parts of the batch, for a thread each: they
// and a block of tiles fit in a core's cache. Larger ones are shared.
constexpr int64_t kPartialBytes = 1 << 19;
constexpr int64_t kParts = 16;
// Tiles that are transformed before threads exchange them.
constexpr int64_t kSharedTiles = 256;

// Merges mean and M2 of blocks, [block][channel], into the statistics of an output's channels.
void merge_moments(const Conv3x3Forward& op, const double* means, const double* squares,
                   const std::vector<int64_t>& counts);

struct ConvKernels {
  void (*forward)(const Conv3x3Forward&);
  void (*dgrad)(const Conv3x3Dgrad&);
  void (*wgrad)(const Conv3x3Wgrad&);
  int64_t (*filter_elements)(int64_t inputs, int64_t outputs);
  void (*filters)(const Conv3x3Filters&);
  void (*inference)(const Conv3x3Inference&);
  void (*conv_wgrad)(const ConvWgrad&);
};

ConvKernels conv_baseline();
#if defined(__x86_64__)
ConvKernels conv_avx2();
ConvKernels conv_avx512();
#endif

}  // namespace resnet_fused::cpu
