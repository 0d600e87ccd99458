// Turns an operator's gate and visibility into what the kernels read: dropped keys become a gather list, with
// the intervals renumbered to match, and a gate on keys alone becomes one weight per key.
#pragma once

#include <vector>

#include "kernels.h"

namespace gate4d {

struct GateInput {
  int batch, queries, keys;
  const float *query_score, *key_score;  // [B, Nq], [B, Nk] or null
  const uint8_t* dropped;                // [B, Nk], not 0: dropped, or null
  const int32_t* bounds;                 // [bounds_batch, 3, Nq] or null
  int bounds_batch;                      // 1 or B
  float strength;
  bool renormalize;
  float smallest_weight;  // log2 of what the kernel's sums can take
};

// What the sums of weighted exponentials take beside an exponential of 1. Squares of probabilities take half of it.
constexpr float SMALLEST_WEIGHT = -96, SMALLEST_SQUARED_WEIGHT = -48;

class PreparedGate {
 public:
  explicit PreparedGate(const GateInput& in);
  PreparedGate(const PreparedGate&) = delete;
  // In place: the gradient of a key gate's weights [B, Nk] to that of its scores.
  void key_weight_to_score(float* grad) const;
  Gate gate;

 private:
  void compact(const GateInput& in);
  static bool folds(const GateInput& in);
  std::vector<float> key_weight_;
  std::vector<int32_t> kept_, kept_count_, bounds_;
};

}  // namespace gate4d
