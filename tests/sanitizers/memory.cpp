#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace harness {
namespace {

// Values are those of a table over and over, from a random one on: a sanitizer makes drawing each take
// seconds.
constexpr int64_t kTable = 8191;

uint64_t next(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

template <class T>
std::vector<T> table(double low, double high) {
  std::vector<T> values(kTable);
  uint64_t state = 1;
  for (T& value : values) {
    const double share = double(next(state)) / double(uint64_t(1) << 31);
    value = cpu::store<T>(cpu::Stat<T>(low + (high - low) * share));
  }
  return values;
}

template <class T>
void fill(T* to, int64_t count, const std::vector<T>& values, uint64_t& state) {
  for (int64_t done = 0, from = int64_t(next(state)) % kTable; done < count; from = 0) {
    const int64_t copied = std::min(count - done, kTable - from);
    std::memcpy(to + done, values.data() + from, size_t(copied) * sizeof(T));
    done += copied;
  }
}

}  // namespace

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
Dtype statistics_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }
const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[int(dtype)];
}

Memory::~Memory() {
  for (const Block& block : blocks_) std::free(block.data);
}

uint8_t* Memory::allocate(size_t bytes) {
  blocks_.push_back({std::malloc(bytes), bytes});
  return static_cast<uint8_t*>(blocks_.back().data);
}

void* Memory::values(Dtype dtype, int64_t count) {
  void* data = allocate(size_t(count * bytes_of(dtype)));
  cpu::dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    static const std::vector<T> kValues = table<T>(-2, 2);
    fill(static_cast<T*>(data), count, kValues, state_);
  });
  return data;
}

void* Memory::positive(Dtype dtype, int64_t count) {
  void* data = allocate(size_t(count * bytes_of(dtype)));
  cpu::dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    static const std::vector<T> kValues = table<T>(0.5, 1.5);
    fill(static_cast<T*>(data), count, kValues, state_);
  });
  return data;
}

uint8_t* Memory::bytes(int64_t count) {
  uint8_t* data = allocate(size_t(count));
  for (int64_t i = 0; i < count; i++) data[i] = uint8_t(next(state_));
  return data;
}

uint8_t* Memory::mask(int64_t rows, int64_t columns) {
  const int64_t row_bytes = (columns + 7) / 8;
  uint8_t* data = bytes(rows * row_bytes);
  if (columns % 8 != 0)
    for (int64_t row = 1; row <= rows; row++) data[row * row_bytes - 1] &= uint8_t((1 << columns % 8) - 1);
  return data;
}

void* Memory::result(int64_t bytes) {
  void* data = allocate(size_t(bytes));
  std::memset(data, fill_, size_t(bytes));
  results_.push_back(blocks_.back());
  return data;
}

void* Memory::sum_of(Dtype dtype, int64_t count) {
  void* data = values(dtype, count);
  results_.push_back(blocks_.back());
  return data;
}

int Memory::differing(const Memory& other) const {
  for (size_t i = 0; i < results_.size(); i++)
    if (std::memcmp(results_[i].data, other.results_[i].data, results_[i].bytes) != 0) return int(i);
  return -1;
}

}  // namespace harness
