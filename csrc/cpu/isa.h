// Included once by every isa_*.cpp, after it has set its target.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own undefined-register intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "attention_backward.h"
#include "attention_forward.h"
#include "cross_moments.h"
#include "received_attention.h"

#define GATE4D_DEFINE_KERNELS(symbol, name)                                                  \
  namespace gate4d {                                                                         \
  extern const Kernels symbol;                                                               \
  const Kernels symbol = {name,     PANEL,     forward_scratch,  forward,  backward_scratch, \
                          backward, sum_parts, received_scratch, received, cross_scratch,    \
                          cross};                                                            \
  }
