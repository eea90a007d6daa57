// Chooses the kernels for the machine's instruction set, and what of them does not depend on it.
#include "conv.h"

#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../accessible.h"
#include "../large_buffers.h"

namespace resnet_fused::cpu {
namespace {

constexpr size_t kLine = 64;

size_t bytes_of(int64_t elements) { return size_t(elements) * sizeof(float); }

// Aligned to cache lines; what is left of the last one is not to be accessed.
void* allocate(size_t bytes) {
  const size_t capacity = (bytes + kLine - 1) / kLine * kLine;
  void* data = std::aligned_alloc(kLine, capacity);
  if (data == nullptr) throw std::bad_alloc();
  set_accessible(data, bytes, capacity);
  return data;
}

struct Scratch {
  float* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(data); }
};

// What RESNET_FUSED_CPU_ISA asks for, where the machine can run it, or the widest.
const char* choose_isa() {
  const char* asked = std::getenv("RESNET_FUSED_CPU_ISA");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("x86-64-v4"), has_avx2 = __builtin_cpu_supports("x86-64-v3");
  const bool limits_to_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
  const bool limits_to_baseline = asked != nullptr && std::strcmp(asked, "baseline") == 0;
  if (has_avx512 && !limits_to_avx2 && !limits_to_baseline) return "avx512";
  if (has_avx2 && !limits_to_baseline) return "avx2";
#else
  (void)asked;
#endif
  return "baseline";
}

ConvKernels choose() {
#if defined(__x86_64__)
  if (std::strcmp(cpu_isa(), "avx512") == 0) return conv_avx512();
  if (std::strcmp(cpu_isa(), "avx2") == 0) return conv_avx2();
#endif
  return conv_baseline();
}

const ConvKernels& kernels() {
  static const ConvKernels chosen = choose();
  return chosen;
}

}  // namespace

Buffer::Buffer(int64_t elements) {
  const size_t bytes = bytes_of(std::max<int64_t>(elements, 1));
  void* large = bytes > size_t(kLargeBuffer) ? take_large_buffer(bytes) : nullptr;
  is_large_ = large != nullptr;
  data_ = static_cast<float*>(is_large_ ? large : allocate(bytes));
}

Buffer::~Buffer() { is_large_ ? give_large_buffer(data_) : std::free(data_); }

const char* cpu_isa() {
  static const char* const isa = choose_isa();
  return isa;
}

int64_t cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return int64_t(size);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

float* scratch(int64_t elements) {
  static thread_local Scratch held;
  const size_t bytes = bytes_of(elements);
  if (held.bytes < bytes) {
    std::free(held.data);
    held.data = nullptr;
    held.bytes = 0;
    held.data = static_cast<float*>(allocate(bytes));
    held.bytes = bytes;
  }
  set_accessible(held.data, bytes, held.bytes);
  return held.data;
}

void merge_moments(const Conv3x3Forward& op, const double* means, const double* squares,
                   const std::vector<int64_t>& counts) {
  float *mean = static_cast<float*>(op.mean), *var = static_cast<float*>(op.var),
        *invstd = static_cast<float*>(op.invstd);
  for (int64_t k = 0; k < op.outputs; k++) {
    double count = 0, total_mean = 0, m2 = 0;
    for (size_t block = 0; block < counts.size(); block++) {
      const double added = double(counts[block]), delta = means[block * op.outputs + k] - total_mean;
      const double share = added / (count + added);
      total_mean += delta * share;
      m2 += squares[block * op.outputs + k] + delta * delta * count * share;
      count += added;
    }
    const double variance = m2 / count;
    mean[k] = float(total_mean);
    var[k] = float(variance);
    invstd[k] = float(1 / std::sqrt(variance + op.eps));
  }
}

void conv3x3_forward(const Conv3x3Forward& op) { kernels().forward(op); }
void conv3x3_dgrad(const Conv3x3Dgrad& op) { kernels().dgrad(op); }
void conv3x3_wgrad(const Conv3x3Wgrad& op) { kernels().wgrad(op); }
void conv_wgrad(const ConvWgrad& op) { kernels().conv_wgrad(op); }
int64_t conv3x3_filter_elements(int64_t inputs, int64_t outputs) {
  return kernels().filter_elements(inputs, outputs);
}
void conv3x3_filters(const Conv3x3Filters& op) { kernels().filters(op); }
void conv3x3_inference(const Conv3x3Inference& op) { kernels().inference(op); }

}  // namespace resnet_fused::cpu
