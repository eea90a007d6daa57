// Calls the CPU kernels without Python and torch, for sanitizers that know neither.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/element.h"
#include "kernels.h"

namespace harness {

using namespace resnet_fused;

void set_num_threads(int threads);

// The operands of a call. Every block is the C library's and has exactly the bytes of its operand, so that
// the first byte beyond it is none of the program's. Two of these give the same values in the same order.
class Memory {
 public:
  // fill: what results hold before the call.
  explicit Memory(int fill) : fill_(fill) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  void* values(Dtype dtype, int64_t count);    // between -2 and 2
  void* positive(Dtype dtype, int64_t count);  // between 0.5 and 1.5
  uint8_t* bytes(int64_t count);
  // Bits of `columns` columns in each row; those beyond the last column are zero.
  uint8_t* mask(int64_t rows, int64_t columns);
  // What a kernel writes.
  void* result(int64_t bytes);
  // What it adds to.
  void* sum_of(Dtype dtype, int64_t count);
  // The first result that differs from another's, or -1.
  int differing(const Memory& other) const;

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  uint8_t* allocate(size_t bytes);
  std::vector<Block> blocks_, results_;
  int fill_;
  uint64_t state_ = 1;
};

struct Case {
  std::string name;
  std::function<void(Memory&)> run;
};

int64_t bytes_of(Dtype dtype);
// Of the statistics of an activation.
Dtype statistics_of(Dtype dtype);
const char* name_of(Dtype dtype);

std::vector<Case> elementwise_cases();
std::vector<Case> convolution_cases();
// Eight threads that take, use and give back buffers; how often one found what another had written.
int64_t share_buffers();
// What a sanitizer has to report; false where there is no mistake of that name.
bool make_mistake(const std::string& name);

}  // namespace harness
