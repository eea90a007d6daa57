// Threads for the CPU kernels, so that they need not know whose thread pool it is.
#pragma once

#include <cstdint>
#include <functional>

namespace resnet_fused::cpu {

int num_threads();

// Runs body(i) for every i in [0, tasks), spread over the threads; a single task runs on the caller's.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& body);

// Runs body(i) for every i in [0, tasks), each by the next thread that is free: a thread that is held up by
// another process has fewer. Only where results don't depend on which thread computes what, or when.
void parallel_for_dynamic(int64_t tasks, const std::function<void(int64_t)>& body);

}  // namespace resnet_fused::cpu
