// The pool of large buffers and the scratch memory of threads: used as intended, and not.
#include <atomic>
#include <cstdlib>
#include <thread>

#include "cpu/conv/conv.h"
#include "cpu/large_buffers.h"
#include "harness.h"

namespace harness {

using cpu::give_large_buffer, cpu::kLargeBuffer, cpu::release_large_buffers, cpu::take_large_buffer;

int64_t share_buffers() {
  constexpr int kThreads = 8, kTurns = 100;
  std::atomic<int64_t> overwritten{0};
  const auto work = [&](int mark) {
    for (int turn = 0; turn < kTurns; turn++) {
      const size_t bytes = size_t(kLargeBuffer) + 1 + size_t(turn % 3) * (2 << 20);
      auto* buffer = static_cast<char*>(take_large_buffer(bytes));
      for (size_t i = 0; i < bytes; i += bytes - 1) buffer[i] = char(mark);
      std::this_thread::yield();
      for (size_t i = 0; i < bytes; i += bytes - 1) overwritten += buffer[i] != char(mark);
      give_large_buffer(buffer);
      if (turn % 25 == mark) release_large_buffers();
    }
  };
  std::vector<std::thread> threads;
  for (int mark = 0; mark < kThreads; mark++) threads.emplace_back(work, mark);
  for (std::thread& thread : threads) thread.join();
  release_large_buffers();
  return overwritten;
}

bool make_mistake(const std::string& name) {
  if (name == "idle buffer") {
    auto* buffer = static_cast<char*>(take_large_buffer(kLargeBuffer));
    give_large_buffer(buffer);
    buffer[kLargeBuffer / 2] = 1;
  } else if (name == "end of a large buffer") {
    static_cast<char*>(take_large_buffer(kLargeBuffer + 3))[kLargeBuffer + 3] = 1;
  } else if (name == "end of a small buffer") {
    const cpu::Buffer buffer(5);
    buffer.data()[5] = 1;
  } else if (name == "end of scratch memory") {
    cpu::scratch(1000);
    cpu::scratch(10)[10] = 1;
  } else if (name == "misaligned") {
    Memory memory(0);
    const Norm norm{memory.values(Dtype::f32, 1), memory.positive(Dtype::f32, 1), nullptr, nullptr};
    const void* y = memory.bytes(17) + 1;
    cpu::bn_relu({y, norm, nullptr, memory.result(16), {4, 1, 1, true}, Dtype::f32});
  } else if (name == "leak") {
    // Volatile: a block that nobody looks at may be left out by the compiler.
    static_cast<volatile char*>(std::malloc(100))[0] = 1;
  } else {
    return false;
  }
  return true;
}

}  // namespace harness
