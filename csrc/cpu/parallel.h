// Threads for the CPU kernels, so that they need not know whose thread pool it is.
#pragma once

#include <cstdint>
#include <functional>

namespace resnet_fused::cpu {

int num_threads();

// Runs body(i) for every i in [0, tasks), spread over the threads; a single task runs on the caller's.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace resnet_fused::cpu
