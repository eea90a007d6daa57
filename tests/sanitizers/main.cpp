// harness [BEGINNING]      runs the cases whose names begin so, all of them unless given
// harness --mistake NAME   what a sanitizer has to report
//
// A case has to give the same bytes with one, two and three threads, whatever its results held before: no sum
// depends on the number of threads, and everything is written.
#include <cstdio>

#include "harness.h"

namespace {

bool passes(const harness::Case& one) {
  harness::Memory alone(0xff);
  harness::set_num_threads(1);
  one.run(alone);
  for (const int threads : {2, 3}) {
    harness::Memory memory(threads);
    harness::set_num_threads(threads);
    one.run(memory);
    const int differing = alone.differing(memory);
    if (differing < 0) continue;
    std::printf("%s: result %d differs with %d threads\n", one.name.c_str(), differing, threads);
    return false;
  }
  return true;
}

int run(const std::string& beginning) {
  int cases = 0, failed = 0;
  for (const auto& all : {harness::elementwise_cases(), harness::convolution_cases()})
    for (const harness::Case& one : all) {
      if (one.name.rfind(beginning, 0) != 0) continue;
      cases++;
      failed += !passes(one);
    }
  const std::string buffers = "buffers of eight threads";
  if (buffers.rfind(beginning, 0) == 0) {
    const int64_t overwritten = harness::share_buffers();
    if (overwritten > 0) std::printf("%s: %lld overwritten\n", buffers.c_str(), (long long)overwritten);
    cases++;
    failed += overwritten > 0;
  }
  std::printf("%d cases, %d failed, kernels of %s\n", cases, failed, resnet_fused::cpu::cpu_isa());
  return failed > 0 || cases == 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "--mistake") return !harness::make_mistake(arguments[2]);
  return run(count > 1 ? arguments[1] : "");
}
