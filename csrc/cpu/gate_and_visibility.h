// The visible intervals and the gate, as a panel of queries meets a tile of keys.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace {

constexpr int TILE = 64;  // keys per tile
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
constexpr float FAR = 4096.0f;  // logits beyond: products of them are rounded by more than an exponent may be off

// |scale|. Never 0: a hidden key's logit of -inf must stay -inf.
GATE4D_INLINE float magnitude(float scale) {
  const float size = __builtin_fabsf(scale);
  return size < SMALLEST_NORMAL ? SMALLEST_NORMAL : size;
}

// lse of a row as the exponent log2(e) (s - lse) of its probabilities takes it: far, the difference is taken first,
// with the product rounded as the forward rounded it. So a row's largest probability is right whatever its logits are.
struct Shift {
  float lse;                // natural; inf for a row without weight, whose exponentials are all 0
  float base2, base2_rest;  // -log2(e) lse, and what rounding took from it; 0 in a panel or tile with far rows
  bool far;

  explicit Shift(float natural) {
    const float infinity = __builtin_inff();
    lse = natural == -infinity ? infinity : natural;
    far = lse > FAR || lse < -FAR;
    if (lse == infinity) {
      base2 = -infinity, base2_rest = 0, far = false;
    } else {
      base2 = -lse * LOG2E;
      base2_rest = (float)(-lse * 1.4426950408889634 - base2);
    }
  }
};

// A gate of strength 1 is its own kind: a choice of powers inside the loop over scores costs more than the weight.
// The weights of the two kinds that fold are part of the logits, see Gate::folded. Pairs come last.
enum GateKind { NO_GATE, KEY_GATE, KEY_FOLD, PAIR_GATE, PAIR_POWER_GATE, PAIR_FOLD };

constexpr bool folds(GateKind kind) { return kind == KEY_FOLD || kind == PAIR_FOLD; }

GATE4D_INLINE GateKind kind_of(const gate4d::Gate& gate) {
  if (gate.key_weight) return gate.folded ? KEY_FOLD : KEY_GATE;
  if (!gate.query_score) return NO_GATE;
  if (gate.folded) return PAIR_FOLD;
  return gate.strength == 1 ? PAIR_GATE : PAIR_POWER_GATE;
}

// b, or the key weights, of a tile; true if one of them makes a weight exactly 0.
bool read_key_gate(const gate4d::Gate& gate, GateKind kind, int batch, int keys, int first, int n, float* to) {
  const int64_t offset = (int64_t)batch * keys;
  const float* from = (kind < PAIR_GATE ? gate.key_weight : gate.key_score) + offset;
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

// strength * log(base), -inf where the weight is 0.
GATE4D_INLINE vf log_weight(vf base, const Power& p) {
  return select(base > 0.0f, log2(base) * (p.exponent * LN2), set1(-__builtin_inff()));
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
  int rows;  // queries in use; the other lanes repeat the last one's bounds
  Interval interval;
  bool blocks;  // some a is exactly 1, so that a key with b = 1 has weight 0
  int32_t start[PANEL], end[PANEL], sink[PANEL];
  float score[PANEL];  // a
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
  const int32_t* starts = gate.bounds + batch * gate.bounds_batch + first;
  const int32_t *ends = starts + queries, *sinks = ends + queries;
  p.interval = {INT32_MAX, 0, INT32_MAX, 0, INT32_MAX, 0};
  for (int i = 0; i < PANEL; ++i) {
    const int from = min(i, p.rows - 1);
    const int start = p.start[i] = starts[from], end = p.end[i] = ends[from], sink = p.sink[i] = sinks[from];
    Interval one = {start, start, end, end, sink, sink};
    if (end <= start) one.start_min = INT32_MAX, one.end_max = 0;  // empty: asks for no tile
    p.interval = merge(p.interval, one);
  }
}

// Which queries of a panel see a key.
template <int R>
struct Seen {
  vi start[R], end[R], sink[R];

  explicit Seen(const PanelQueries& p) {
    for (int r = 0; r < R; ++r) {
      start[r] = load(p.start + r * W);
      end[r] = load(p.end + r * W);
      sink[r] = load(p.sink + r * W);
    }
  }
  GATE4D_INLINE vi operator()(int r, int key) const {
    const vi j = set1(key);
    return (j < sink[r]) | ((j >= start[r]) & (j < end[r]));
  }
};

// Keys outside a query's interval get a logit of -inf, and in `zeroed`, if given, a 0.
template <int R>
void hide_invisible(float* s, float* zeroed, int n, int first_key, const PanelQueries& p) {
  const Seen<R> seen(p);
  const vf hidden = set1(-__builtin_inff());
  for (int j = 0; j < n; ++j) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      const int64_t at = j * PANEL + r * W;
      const vi sees = seen(r, first_key + j);
      store(s + at, select(sees, load(s + at), hidden));
      if (zeroed) store(zeroed + at, select(sees, load(zeroed + at), vf{}));
    }
  }
}

// out[d][lane] += x[j][d] * w[j][lane] for the keys that a query sees. A matrix product would carry a NaN or an
// infinity of x to the queries that do not, through its product with their weight of 0.
template <class M, int R>
void add_seen(const typename M::Elem* x, int64_t row, const typename M::Elem* w, int n, int dim, int first_key,
              const PanelQueries& p, float* out) {
  const Seen<R> seen(p);
  for (int j = 0; j < n; ++j)
    for (int d = 0; d < dim; ++d) {
      const vf xj = set1(M::part(x[j / M::pack * row + d], j % M::pack));
      GATE4D_UNROLL for (int r = 0; r < R; ++r) {
        float* const to = out + (int64_t)d * PANEL + r * W;
        const vf old = load(to), wj = M::part(load(w + j / M::pack * PANEL + r * W), j % M::pack);
        store(to, select(seen(r, first_key + j), fma(xj, wj, old), old));
      }
    }
}

// Keys of weight exactly 0 where the rows are renormalised must not take part in the maximum: their logits become
// -inf too. They are seen all the same, and a NaN stays.
template <int R>
void hide_weightless(GateKind gate, float* s, int n, const float* b, const PanelQueries& p) {
  const vf hidden = set1(-__builtin_inff());
  for (int j = 0; j < n; ++j) {
    if (b[j] != (gate == KEY_GATE ? 0.0f : 1.0f)) continue;
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* at = s + j * PANEL + r * W;
      const vf x = load(at);
      const vi out = gate == KEY_GATE ? x == x : (x == x) & (load(p.score + r * W) == 1.0f);
      store(at, select(out, hidden, x));
    }
  }
}

// Scaled logits with the logarithms of the weights, in place.
template <int R>
void fold_weights(GateKind gate, float* s, int n, float scale, const float* b, const PanelQueries& p,
                  const Power& strength) {
  vf a[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) a[r] = gate == PAIR_FOLD ? load(p.score + r * W) : vf{};
  for (int j = 0; j < n; ++j) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* at = s + j * PANEL + r * W;
      const vf bj = set1(b[j]);
      const vf log = gate == KEY_FOLD ? bj : log_weight(one_minus_product(a[r], bj), strength);
      store(at, fma(load(at), set1(scale), log));
    }
  }
}

}  // namespace
