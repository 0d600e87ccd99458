#include "gate_input.h"

#include <algorithm>
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
    gate.folded = folds(in);
    if (in.query_score == nullptr) {
      key_weight_.resize((size_t)in.batch * in.keys);
      for (size_t i = 0; i < key_weight_.size(); ++i) {
        const float w = 1 - in.key_score[i];
        if (gate.folded) key_weight_[i] = (float)(in.strength * std::log((double)w));
        else key_weight_[i] = in.strength == 1 ? w : std::pow(w, in.strength);
      }
      gate.key_weight = key_weight_.data();
    }
  }
  if (in.dropped != nullptr) compact(in);
}

// The largest score below 1, and whether one is 1.
static float largest_score(const float* score, size_t n, bool& one) {
  float largest = 0;
  one = false;
  for (size_t i = 0; i < n; ++i) {
    if (score[i] >= 1) one = true;
    else if (score[i] > largest) largest = score[i];
  }
  return largest;
}

// Scores below 1 are at most 1 - 2^-24, which bounds the weights. A weight of exactly 0 needs no range.
bool PreparedGate::folds(const GateInput& in) {
  const float strength = in.strength;
  if (!in.renormalize || strength == 1) return false;  // un-gated sums are not small; 2^-24 always fits
  const bool by_products = strength == 0.5f || (strength <= 8 && strength == std::floor(strength));
  if (in.query_score != nullptr && !by_products) return true;  // a power by logarithms costs more than the logarithm
  if (-24 * strength >= in.smallest_weight) return false;
  bool query_one = true, key_one;
  const float query = in.query_score ? largest_score(in.query_score, (size_t)in.batch * in.queries, query_one) : 0;
  const float key = largest_score(in.key_score, (size_t)in.batch * in.keys, key_one);
  const float product = std::max({query * key, query_one ? key : 0, key_one ? query : 0});
  return strength * std::log2(std::max(1 - product, 0x1p-24f)) < in.smallest_weight;
}

void PreparedGate::key_weight_to_score(float* grad) const {
  const float strength = gate.strength;
  for (size_t i = 0; i < key_weight_.size(); ++i) {
    const float base = 1 - gate.key_score[i];
    // At a weight of 0 the derivative is infinite for small strengths; it is taken as 0 unless the strength is 1.
    if (base <= 0 && strength != 1) grad[i] = 0;
    else if (gate.folded) grad[i] *= -strength / base;
    else grad[i] *= strength == 1 ? -1 : -strength * std::pow(base, strength - 1);
  }
}

void PreparedGate::compact(const GateInput& in) {
  kept_.resize((size_t)in.batch * in.keys);
  kept_count_.resize(in.batch);
  if (in.bounds != nullptr) bounds_.resize((size_t)in.batch * 3 * in.queries);
  std::vector<int32_t> before((size_t)in.keys + 1);  // kept keys before each position
  for (int b = 0; b < in.batch; ++b) {
    const uint8_t* dropped = in.dropped + (int64_t)b * in.keys;
    int32_t* kept = kept_.data() + (int64_t)b * in.keys;
    int count = 0;
    for (int j = 0; j < in.keys; ++j) {
      before[j] = count;
      if (!dropped[j]) kept[count++] = j;
    }
    before[in.keys] = kept_count_[b] = count;
    if (in.bounds == nullptr) continue;
    const int32_t* from = in.bounds + (in.bounds_batch == 1 ? 0 : 3 * (int64_t)in.queries * b);
    int32_t* to = bounds_.data() + 3 * (int64_t)in.queries * b;
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
