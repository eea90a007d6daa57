// The emulated device: threads of a block are fibers, which run until they end or reach a barrier.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kMostThreads = 256;

bool reverse_order = false;

enum class State { running, waiting, done };

// A ucontext only to start on its own stack: swapcontext would save the signal mask, by a system call, each
// time.
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::done;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;
size_t current = 0;
const std::function<void()>* thread_body = nullptr;

void leave(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

void enter(Fiber& fiber) {
  fiber.state = State::running;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Serves one block after another, which saves setting up a context for each thread of each.
void fiber_main() {
  for (;;) {
    (*thread_body)();
    leave(State::done);
  }
}

void start_fibers() {
  fibers = std::vector<Fiber>(kMostThreads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
}

void run_block() {
  const size_t threads = size_t{blockDim.x} * blockDim.y;
  for (;;) {
    size_t done = 0;
    for (size_t i = 0; i < threads; ++i) {
      current = reverse_order ? threads - 1 - i : i;
      threadIdx =
          dim3(static_cast<unsigned>(current % blockDim.x), static_cast<unsigned>(current / blockDim.x), 0);
      enter(fibers[current]);
      done += fibers[current].state == State::done ? 1 : 0;
    }
    if (done == threads) return;
    if (done != 0) {
      fibers.clear();  // the waiting ones are lost in the middle of the kernel
      throw std::runtime_error("some threads of a block ended while others wait at a barrier");
    }
  }
}

}  // namespace

void __syncthreads() { leave(State::waiting); }

void emulate(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z != 1) throw std::runtime_error("invalid block");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) throw std::runtime_error("invalid grid");
  if (fibers.empty()) start_fibers();
  gridDim = grid;
  blockDim = block;
  thread_body = &thread;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block();
    }
  }
}

// Which thread of a block goes first; a result that depends on it lacks a barrier.
extern "C" void set_reverse_order(int reverse) { reverse_order = reverse != 0; }
