// All kernels, for the instruction set, kLanes, kRows and kGradRows of the file that includes this. Without
// include guards: each of these files is compiled once for each instruction set, in its namespace.
// clang-format off
#include "vec.h"
#include "gemm.h"
#include "operands.h"
#include "tiles.h"
#include "epilogues.h"
#include "winograd.h"
#include "winograd_wgrad.h"
#include "implicit_wgrad.h"
// clang-format on
