// Whether the weights changed that evaluation has folded: ops/inference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "bindings_common.h"

namespace resnet_fused {
namespace {

// A number that changes when a tensor's elements do, but for single ones: of kSamples words of it.
constexpr int64_t kSamples = 64;

uint64_t checksum_of(const Tensor& t, uint64_t hash) {
  int64_t elements = t.numel() == 0 ? 0 : 1;
  if (elements > 0)
    for (int64_t i = 0; i < t.dim(); i++) elements += (t.size(i) - 1) * t.stride(i);
  const int64_t words = std::max<int64_t>(elements, 0) * t.element_size() / 4;
  const char* data = static_cast<const char*>(t.const_data_ptr());
  for (int64_t i = 0; i < std::min(words, kSamples); i++) {
    const int64_t word = words <= kSamples ? i : words * i / kSamples;
    uint32_t value;
    std::memcpy(&value, data + 4 * word, 4);
    hash = (hash ^ value) * 0x100000001b3;
  }
  return hash;
}

int64_t sampled_checksum(const Tensor& weight, const Tensor& mean, const Tensor& var,
                         const OptionalTensor& gamma, const OptionalTensor& beta) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const Tensor* t : {&weight, &mean, &var}) hash = checksum_of(*t, hash);
  for (const OptionalTensor* t : {&gamma, &beta})
    if (*t) hash = checksum_of(**t, hash);
  return int64_t(hash);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("sampled_checksum(Tensor weight, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("sampled_checksum", TORCH_BOX(&resnet_fused::sampled_checksum));
}
