#include "gate_input.h"

#include <cmath>

namespace gate4d {

PreparedGate::PreparedGate(const GateInput& in) : gate{} {
  gate.strength = in.strength;
  gate.renormalize = in.renormalize;
  gate.bounds = in.bounds;
  gate.bounds_batch = in.bounds_batch == 1 ? 0 : 3 * (int64_t)in.queries;
  if (in.key_score != nullptr && in.strength != 0) {  // a strength of 0 makes every weight 1
    gate.query_score = in.query_score;
    gate.key_score = in.key_score;
    if (in.query_score == nullptr) {
      key_weight_.resize((size_t)in.batch * in.keys);
      for (size_t i = 0; i < key_weight_.size(); ++i) {
        const float w = 1 - in.key_score[i];
        key_weight_[i] = in.strength == 1 ? w : std::pow(w, in.strength);
      }
      gate.key_weight = key_weight_.data();
    }
  }
  if (in.dropped != nullptr) compact(in);
}

void PreparedGate::key_weight_to_score(float* grad) const {
  for (size_t i = 0; i < key_weight_.size(); ++i) {
    const float base = 1 - gate.key_score[i];
    // At a weight of 0 the derivative is infinite for small strengths; it is taken as 0 unless the strength is 1.
    grad[i] *= gate.strength == 1 ? -1 : base > 0 ? -gate.strength * std::pow(base, gate.strength - 1) : 0;
  }
}

void PreparedGate::compact(const GateInput& in) {
  kept_.resize((size_t)in.batch * in.keys);
  kept_count_.resize(in.batch);
  if (in.bounds != nullptr) bounds_.resize((size_t)in.batch * 3 * in.queries);
  std::vector<int32_t> before((size_t)in.keys + 1);  // kept keys before each position
  for (int b = 0; b < in.batch; ++b) {
    const bool* dropped = in.dropped + (int64_t)b * in.keys;
    int32_t* kept = kept_.data() + (int64_t)b * in.keys;
    int count = 0;
    for (int j = 0; j < in.keys; ++j) {
      before[j] = count;
      if (!dropped[j]) kept[count++] = j;
    }
    before[in.keys] = kept_count_[b] = count;
    if (in.bounds == nullptr) continue;
    const int32_t* from = in.bounds + (in.bounds_batch == 1 ? 0 : b * 3 * (int64_t)in.queries);
    int32_t* to = bounds_.data() + b * 3 * (int64_t)in.queries;
    for (int64_t i = 0; i < 3 * (int64_t)in.queries; ++i) to[i] = before[from[i] < in.keys ? from[i] : in.keys];
  }
  gate.kept = kept_.data();
  gate.kept_count = kept_count_.data();
  if (in.bounds != nullptr) {
    gate.bounds = bounds_.data();
    gate.bounds_batch = 3 * (int64_t)in.queries;
  }
}

}  // namespace gate4d
