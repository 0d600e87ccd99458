// The visible intervals and the gate, as a panel of queries meets a tile of keys.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace {

constexpr int TILE = 64;  // keys per tile
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// |scale| in units of log2. Never 0: a hidden key's logit of -inf must stay -inf.
GATE4D_INLINE float log2_factor(float scale) {
  const float size = __builtin_fabsf(scale);
  return (size < SMALLEST_NORMAL ? SMALLEST_NORMAL : size) * LOG2E;
}

// A gate of strength 1 is its own kind: a choice of powers inside the loop over scores costs more than the weight.
enum GateKind { NO_GATE, KEY_GATE, PAIR_GATE, PAIR_POWER_GATE };

GATE4D_INLINE GateKind kind_of(const gate4d::Gate& gate) {
  if (gate.key_weight) return KEY_GATE;
  if (!gate.query_score) return NO_GATE;
  return gate.strength == 1 ? PAIR_GATE : PAIR_POWER_GATE;
}

// b, or the key weights, of a tile; true if one of them makes a weight exactly 0.
bool read_key_gate(const gate4d::Gate& gate, GateKind kind, int batch, int keys, int first, int n, float* to) {
  const int64_t offset = (int64_t)batch * keys;
  const float* from = (kind == KEY_GATE ? gate.key_weight : gate.key_score) + offset;
  bool weightless = false;
  for (int j = 0; j < n; ++j) {
    to[j] = from[gate.kept ? gate.kept[offset + first + j] : first + j];
    weightless |= to[j] == (kind == KEY_GATE ? 0.0f : 1.0f);
  }
  return weightless;
}

// How w ** strength is computed.
struct Power {
  enum Kind { INTEGER, HALF, GENERAL } kind;
  int integer;
  float exponent;

  explicit Power(float strength) : kind(GENERAL), integer(0), exponent(strength) {
    if (strength == 0.5f) kind = HALF;
    if (strength >= 0 && strength <= 8 && strength == (float)(int)strength) {
      kind = INTEGER;
      integer = (int)strength;
    }
  }
};

GATE4D_INLINE vf power(vf w, const Power& p) {
  switch (p.kind) {
    case Power::HALF:
      return sqrt(w);
    case Power::INTEGER: {
      vf y = set1(1.0f);
      for (int i = 0; i < p.integer; ++i) y *= w;
      return y;
    }
    default:
      return select(w > 0.0f, exp2(log2(w) * p.exponent), vf{});
  }
}

// The keys that the queries of one panel see, and the bounds over all of them that let tiles be skipped.
struct Interval {
  int start_min, start_max, end_min, end_max, sink_min, sink_max;

  GATE4D_INLINE bool sees(int first, int last) const {
    return first < sink_max || (first < end_max && last > start_min);
  }
  GATE4D_INLINE bool sees_all(int first, int last) const {
    return last <= sink_min || (first >= start_max && last <= end_min);
  }
};

constexpr Interval everything(int keys) { return {0, 0, keys, keys, 0, 0}; }

GATE4D_INLINE Interval merge(const Interval& a, const Interval& b) {
  return {min(a.start_min, b.start_min), max(a.start_max, b.start_max), min(a.end_min, b.end_min),
          max(a.end_max, b.end_max),     min(a.sink_min, b.sink_min),   max(a.sink_max, b.sink_max)};
}

// The sinks and the intervals of some queries as two ranges of keys, or as one where they touch.
struct KeyRanges {
  int part[2][2];
};

GATE4D_INLINE KeyRanges key_ranges(const Interval& x) {
  if (x.sink_max == 0) return {{{x.start_min, x.end_max}, {0, 0}}};
  if (x.start_min > x.sink_max) return {{{0, x.sink_max}, {x.start_min, x.end_max}}};
  return {{{0, max(x.sink_max, x.end_max)}, {0, 0}}};
}

// The weight of a pair of scores.
template <GateKind GATE>
GATE4D_INLINE vf pair_weight(vf base, const Power& strength) {
  return GATE == PAIR_POWER_GATE ? power(base, strength) : base;
}

// What a panel knows of its queries.
struct PanelQueries {
  int rows;                               // queries in use; the other lanes repeat the last one's bounds
  Interval interval;
  bool blocks;                            // some a is exactly 1, so that a key with b = 1 has weight 0
  int32_t start[PANEL], end[PANEL], sink[PANEL];
  float score[PANEL];                     // a
};

void read_panel(const gate4d::Gate& gate, int batch, int queries, int keys, int first, PanelQueries& p) {
  p.rows = min(PANEL, queries - first);
  p.blocks = false;
  if (gate.query_score) {
    const float* a = gate.query_score + (int64_t)batch * queries + first;
    for (int i = 0; i < PANEL; ++i) {
      p.score[i] = i < p.rows ? a[i] : 0;
      p.blocks |= p.score[i] == 1;
    }
  }
  p.interval = everything(keys);
  if (!gate.bounds) return;
  const int32_t* bounds = gate.bounds + batch * gate.bounds_batch + first;
  p.interval = {INT32_MAX, 0, INT32_MAX, 0, INT32_MAX, 0};
  for (int i = 0; i < PANEL; ++i) {
    const int from = min(i, p.rows - 1);
    const int start = p.start[i] = bounds[from], end = p.end[i] = bounds[queries + from];
    const int sink = p.sink[i] = bounds[2 * (int64_t)queries + from];
    Interval one = {start, start, end, end, sink, sink};
    if (end <= start) one.start_min = INT32_MAX, one.end_max = 0;  // empty: asks for no tile
    p.interval = merge(p.interval, one);
  }
}

// Keys outside a query's interval get a logit of -inf.
template <int R>
void hide_invisible(float* s, int n, int first_key, const PanelQueries& p) {
  vi start[R], end[R], sink[R];
  for (int r = 0; r < R; ++r) {
    start[r] = load(p.start + r * W);
    end[r] = load(p.end + r * W);
    sink[r] = load(p.sink + r * W);
  }
  const vf hidden = set1(-__builtin_inff());
  for (int j = 0; j < n; ++j) {
    const vi key = set1(first_key + j);
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* x = s + j * PANEL + r * W;
      const vi seen = (key < sink[r]) | ((key >= start[r]) & (key < end[r]));
      store(x, select(seen, load(x), hidden));
    }
  }
}

// So do keys of weight exactly 0 where the rows are renormalised: they must not take part in the maximum.
template <int R>
void hide_weightless(GateKind gate, float* s, int n, const float* b, const PanelQueries& p) {
  const vf hidden = set1(-__builtin_inff());
  for (int j = 0; j < n; ++j) {
    if (b[j] != (gate == KEY_GATE ? 0.0f : 1.0f)) continue;
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* x = s + j * PANEL + r * W;
      store(x, gate == KEY_GATE ? hidden : select(load(p.score + r * W) == 1.0f, hidden, load(x)));
    }
  }
}

}  // namespace
