// Threads for the kernels that ThreadSanitizer understands, in place of torch's. Neighbouring tasks always
// run on different threads, and nothing orders these: which of them is faster doesn't decide what is
// reported.
#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/parallel.h"
#include "harness.h"

namespace {
int threads = 1;
}

void harness::set_num_threads(int count) { threads = count; }

namespace resnet_fused::cpu {

int num_threads() { return threads; }

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body) {
  const int64_t count = std::min<int64_t>(tasks, threads);
  const auto run = [&](int64_t first) {
    for (int64_t i = first; i < tasks; i += count) body(i);
  };
  if (count == 1) return run(0);
  std::vector<std::thread> running;
  for (int64_t first = 0; first < count; first++) running.emplace_back(run, first);
  for (std::thread& thread : running) thread.join();
}

void parallel_for_dynamic(int64_t tasks, const std::function<void(int64_t)>& body) {
  parallel_for(tasks, body);
}

}  // namespace resnet_fused::cpu
