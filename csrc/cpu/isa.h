// One binary for every x86-64: what the hot functions are compiled for, and how they are kept vectorisable.
#pragma once

#include <cstdint>

// RESNET_FUSED_CLONES goes before a plain function (not a template) and compiles it three times; the dynamic
// linker picks the best one the machine can run. It needs ifunc, hence glibc, and a compiler that knows the
// levels; elsewhere the function is compiled once. A clone's target does not reach a function that it merely
// calls, so everything a clone does must be inlined into it: RESNET_FUSED_INLINE on functions,
// RESNET_FUSED_INLINED after the parameters of a lambda. A build that defines it empty compiles once:
// tests/sanitizers.
#if defined(RESNET_FUSED_CLONES)
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RESNET_FUSED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RESNET_FUSED_CLONES
#endif

#if defined(__GNUC__) || defined(__clang__)
#define RESNET_FUSED_INLINE inline __attribute__((always_inline))
#define RESNET_FUSED_INLINED __attribute__((always_inline))
#define RESNET_FUSED_PREFETCH(address) __builtin_prefetch(address)
#else
#define RESNET_FUSED_INLINE inline
#define RESNET_FUSED_INLINED
#define RESNET_FUSED_PREFETCH(address) (void)(address)
#endif

// Before a loop whose iterations are independent: no run-time checks for overlap. These loops are short and
// run once a row, so the checks would cost as much as the work.
#if defined(__clang__)
#define RESNET_FUSED_VECTOR _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define RESNET_FUSED_VECTOR _Pragma("GCC ivdep")
#else
#define RESNET_FUSED_VECTOR
#endif

// Before a loop with a small constant trip count, so that the loop around it is the one that becomes vectors.
#if defined(__clang__)
#define RESNET_FUSED_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define RESNET_FUSED_UNROLL _Pragma("GCC unroll 16")
#else
#define RESNET_FUSED_UNROLL
#endif

// Before a short loop that is not worth unrolling: the code would be repeated for every clone and element
// type.
#if defined(__clang__)
#define RESNET_FUSED_NO_UNROLL _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define RESNET_FUSED_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define RESNET_FUSED_NO_UNROLL
#endif

// Defines `name(const Args<T>&)` for the four element types as cloned functions around `body`.
#define RESNET_FUSED_CLONE_EACH(name, Args, body)                     \
  RESNET_FUSED_CLONES void name(const Args<float>& args) { body; }    \
  RESNET_FUSED_CLONES void name(const Args<double>& args) { body; }   \
  RESNET_FUSED_CLONES void name(const Args<BFloat16>& args) { body; } \
  RESNET_FUSED_CLONES void name(const Args<Half>& args) { body; }
