// Gated attention, forward: online softmax over tiles of keys, queries along the lanes.
//
// A task is one block of panels of queries of one head. For every tile of keys that a panel sees: logits by
// one matrix product, the gate as a weight on the exponentials, values by another. Memory is the task's scratch.
#pragma once

#include "gate_and_visibility.h"

namespace {

using gate4d::AttentionForward;

constexpr float RESCALE_AT = 8.0f;  // let exponentials grow to 2^8 before the running maximum is moved

// Running sums of a panel, one per query. `peak` is the reference that exponentials are taken against.
struct Running {
  float peak[PANEL], total[PANEL];
  float mass[PANEL], entropy[PANEL], square[PANEL], largest[PANEL];  // row statistics: of the gated weights
};

void reset(Running& run) {
  for (int i = 0; i < PANEL; ++i) {
    run.peak[i] = -__builtin_inff();
    run.total[i] = run.mass[i] = run.entropy[i] = run.square[i] = run.largest[i] = 0;
  }
}

// Moves the reference up where the tile's maximum exceeds it by enough, and brings the sums along.
template <int R>
void raise_peak(const float* s, int n, float factor, bool row_stats, Running& run, float* out, int out_rows) {
  vf top[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) top[r] = load(s + r * W);
  for (int j = 1; j < n; ++j)
    GATE4D_UNROLL for (int r = 0; r < R; ++r) top[r] = max(load(s + j * PANEL + r * W), top[r]);
  vi moved = {};
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    const vf peak = load(run.peak + r * W);
    moved |= ((top[r] - peak) * factor > RESCALE_AT) | ((peak == -__builtin_inff()) & (top[r] > peak));
  }
  if (!any(moved)) return;
  vf alpha[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    const vf old = load(run.peak + r * W), now = max(top[r], old);
    store(run.peak + r * W, now);
    const vi fresh = (old == -__builtin_inff());
    const vf shift = select(fresh, vf{}, (old - now) * factor);  // in units of log2
    alpha[r] = select(fresh, vf{}, exp2(shift));
    store(run.total + r * W, load(run.total + r * W) * alpha[r]);
    if (!row_stats) continue;
    const vf mass = load(run.mass + r * W);
    store(run.entropy + r * W, alpha[r] * fma(shift, mass, load(run.entropy + r * W)));
    store(run.mass + r * W, mass * alpha[r]);
    store(run.square + r * W, load(run.square + r * W) * alpha[r] * alpha[r]);
    store(run.largest + r * W, load(run.largest + r * W) * alpha[r]);
  }
  for (int d = 0; d < out_rows; ++d)
    GATE4D_UNROLL for (int r = 0; r < R; ++r) store(out + d * PANEL + r * W, load(out + d * PANEL + r * W) * alpha[r]);
}

// Takes the peaks from the logits before they are scaled where one is far.
template <int R>
bool subtract_far_peak(float* s, int n, float factor, const Running& run) {
  vi far = {};
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    const vf peak = load(run.peak + r * W);
    far |= (peak * factor > FAR) | ((peak * factor < -FAR) & (peak > -__builtin_inff()));
  }
  if (!any(far)) return false;
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    vf peak = load(run.peak + r * W);
    peak = select(peak == -__builtin_inff(), vf{}, peak);
    for (int j = 0; j < n; ++j) store(s + j * PANEL + r * W, load(s + j * PANEL + r * W) - peak);
  }
  return true;
}

// Logits of one vector of queries to gated exponentials, in place, with the tile's sums added to the running
// ones. One vector at a time: the polynomials' coefficients and the sums then stay in registers.
template <class M, GateKind GATE, bool RENORMALIZE, bool STATS>
void weigh(float* s, int lane, int n, float factor, const float* peak, const float* b, const PanelQueries& p,
           const Power& strength, Running& run) {
  const vf reference = load(peak + lane), shift = select(reference == -__builtin_inff(), vf{}, reference * -factor);
  const vf a = GATE >= PAIR_GATE ? load(p.score + lane) : vf{};
  vf total = {}, mass = {}, entropy = {}, square = {}, largest = load(run.largest + lane);
  s += lane;
  for (int j = 0; j < n; j += M::pack) {
    vf pair[M::pack];
    GATE4D_UNROLL for (int i = 0; i < M::pack; ++i) {
      if (M::pack > 1 && j + i == n) {  // an odd last key
        pair[i] = vf{};
        break;
      }
      vf log = clamp_exponent(fma(load(s + (j + i) * PANEL), set1(factor), shift));
      const vf e = exp2_clamped(log);
      vf x = e;
      if (GATE != NO_GATE) {
        const vf bj = set1(b[j + i]);
        const vf w = GATE == KEY_GATE ? bj : pair_weight<GATE>(one_minus_product(a, bj), strength);
        x = e * w;
        if (STATS) log += log2(w);
      }
      total += RENORMALIZE ? x : e;
      if (STATS) {
        if (!RENORMALIZE) mass += x;
        entropy = fma(x, log, entropy);
        square = fma(x, x, square);
        largest = max(x, largest);
      }
      pair[i] = x;
    }
#if defined(GATE4D_AVX512_BF16)
    if (M::pack == 2) {
      store((uint32_t*)s + j / 2 * PANEL, to_pairs(pair[0], pair[M::pack - 1]));
      continue;
    }
#endif
    store(s + j * PANEL, pair[0]);
  }
  store(run.total + lane, load(run.total + lane) + total);
  if (!STATS) return;
  store(run.mass + lane, load(run.mass + lane) + (RENORMALIZE ? total : mass));
  store(run.entropy + lane, load(run.entropy + lane) + entropy);
  store(run.square + lane, load(run.square + lane) + square);
  store(run.largest + lane, largest);
}

template <class M, bool STATS>
void weigh_by_gate(GateKind gate, bool renormalize, float* s, int lane, int n, float factor, const float* peak,
                   const float* b, const PanelQueries& p, const Power& strength, Running& run) {
#define GATE4D_CASE(kind)                                                                               \
  case kind:                                                                                            \
    if (renormalize) return weigh<M, kind, true, STATS>(s, lane, n, factor, peak, b, p, strength, run); \
    return weigh<M, kind, false, STATS>(s, lane, n, factor, peak, b, p, strength, run);
  switch (gate) {
    GATE4D_CASE(KEY_GATE)
    GATE4D_CASE(PAIR_GATE)
    GATE4D_CASE(PAIR_POWER_GATE)
    default:
      weigh<M, NO_GATE, true, STATS>(s, lane, n, factor, peak, b, p, strength, run);
  }
#undef GATE4D_CASE
}

// The pieces of a task's scratch.
template <class M>
struct ForwardTile {
  using Elem = typename M::Elem;
  int depth, values;   // elements of a packed key, padded features of a packed value
  Elem *q, *k, *v;     // [panels][depth][PANEL], [TILE][depth], [TILE / pack][values]
  float *s, *out, *b;  // [TILE][PANEL], [panels][values][PANEL], [TILE]
  PanelQueries* queries;
  Running* running;

  ForwardTile(const AttentionForward& f, Scratch& scratch)
      : depth((f.head_dim + M::pack - 1) / M::pack), values(round_up(f.value_dim, J)) {
    q = scratch.take<Elem>((int64_t)f.panels * depth * PANEL);
    out = scratch.take<float>((int64_t)f.panels * values * PANEL);
    k = scratch.take<Elem>((int64_t)TILE * depth);
    v = scratch.take<Elem>((int64_t)TILE / M::pack * values);
    s = scratch.take<float>((int64_t)TILE * PANEL);
    b = scratch.take<float>(TILE);
    queries = scratch.take<PanelQueries>(f.panels);
    running = scratch.take<Running>(f.panels);
  }
};

template <class T>
void pack_values(const T* from, int64_t stride, const int32_t* index, int first, int n, int dim, int padded,
                 float* to) {
  pack_rows(from, stride, index, first, n, dim, padded, to);
}
#if defined(GATE4D_AVX512_BF16)
void pack_values(const bf16* from, int64_t stride, const int32_t* index, int first, int n, int dim, int padded,
                 uint32_t* to) {
  pack_row_pairs(from, stride, index, first, n, dim, padded, to);
}
#endif

// What is known of a packed tile of keys.
struct TileFacts {
  bool packed, weightless;
  int values_finite;  // 1 or 0; -1: not looked at, as long as every query sees the tile
};

template <class M, int R>
void forward_panel(const AttentionForward& f, const ForwardTile<M>& t, int panel, int first, int n, GateKind gate,
                   TileFacts& facts, const Power& strength, float factor) {
  const PanelQueries& p = t.queries[panel];
  Running& run = t.running[panel];
  float* out = t.out + (int64_t)panel * t.values * PANEL;
  const bool hides = !p.interval.sees_all(first, first + n);
  const int pairs = (n + M::pack - 1) / M::pack;
  gemm_rows<M, R>(t.k, t.depth, 1, t.q + (int64_t)panel * t.depth * PANEL, PANEL, t.s, PANEL, round_up(n, J), t.depth,
                  false);
  if (hides) hide_invisible<R>(t.s, nullptr, n, first, p);
  if (folds(gate)) {
    fold_weights<R>(gate, t.s, n, magnitude(f.scale), t.b, p, strength);
    gate = NO_GATE;
  } else if (facts.weightless && f.gate.renormalize && (gate == KEY_GATE || p.blocks)) {
    hide_weightless<R>(gate, t.s, n, t.b, p);
  }
  raise_peak<R>(t.s, n, factor, f.stats != nullptr, run, out, t.values);
  const float none[PANEL] = {};
  const float* peak = subtract_far_peak<R>(t.s, n, factor, run) ? none : run.peak;
  const auto by_gate = f.stats ? weigh_by_gate<M, true> : weigh_by_gate<M, false>;
  for (int r = 0; r < R; ++r) by_gate(gate, f.gate.renormalize, t.s, r * W, n, factor, peak, t.b, p, strength, run);
  const auto* weights = (const typename M::Elem*)t.s;
  if (hides && facts.values_finite < 0) facts.values_finite = all_finite(t.v, (int64_t)pairs * t.values);
  if (hides && !facts.values_finite) add_seen<M, R>(t.v, t.values, weights, n, t.values, first, p, out);
  else gemm_rows<M, R>(t.v, 1, t.values, weights, PANEL, out, PANEL, t.values, pairs, true);
}

template <class M, class T>
void finish_panel(const AttentionForward& f, const ForwardTile<M>& t, int panel, int64_t row, T* out) {
  const int rows = t.queries[panel].rows;
  const Running& run = t.running[panel];
  const float scale = f.gate.folded ? 1 : magnitude(f.scale);
  float inverse[PANEL];
  for (int i = 0; i < PANEL; ++i) {
    // Weights that underflow weigh nothing: a denormal sum has no finite inverse.
    const float total = run.total[i] < SMALLEST_NORMAL ? 0 : run.total[i];
    inverse[i] = total == 0 ? 0 : 1 / total;
    if (i >= rows) continue;
    const float log_total = __builtin_logf(total);
    // The backward rounds the same product: where the peak is the whole sum, its probability is exactly 1.
    f.lse[row + i] = total == 0 ? -__builtin_inff() : rounded(run.peak[i] * scale) + log_total;
    if (!f.stats) continue;
    const int64_t plane = (int64_t)f.batch * f.heads * f.queries;
    const float mass = run.mass[i] * inverse[i];
    f.stats[row + i] = total == 0 ? 0 : log_total * mass - LN2 * run.entropy[i] * inverse[i];
    f.stats[row + i + plane] = run.largest[i] * inverse[i];
    f.stats[row + i + 2 * plane] = run.square[i] * inverse[i] * inverse[i];
  }
  unpack_columns(t.out + (int64_t)panel * t.values * PANEL, inverse, rows, f.value_dim, out, f.out.token);
}

template <class M, class T>
void forward_task(const AttentionForward& f, int64_t task, Scratch scratch) {
  const ForwardTile<M> t(f, scratch);
  const int block = f.panels * PANEL, blocks = (f.queries + block - 1) / block;
  // Late queries see most under causal visibility: start with them, so that threads finish together.
  const int first_query = (blocks - 1 - (int)(task % blocks)) * block;
  const int head = (int)(task / blocks % f.heads), batch = (int)(task / blocks / f.heads);
  const T* q = (const T*)f.q.data + batch * f.q.batch + head * f.q.head;
  const T* k = (const T*)f.k.data + batch * f.k.batch + head * f.k.head;
  const T* v = (const T*)f.v.data + batch * f.v.batch + head * f.v.head;
  T* out = (T*)f.out.data + batch * f.out.batch + head * f.out.head;
  const int32_t* kept = f.gate.kept ? f.gate.kept + (int64_t)batch * f.keys : nullptr;
  const int keys = kept ? f.gate.kept_count[batch] : f.keys;
  const GateKind gate = kind_of(f.gate);
  const Power strength(f.gate.strength);
  const float factor = (folds(gate) ? 1 : magnitude(f.scale)) * LOG2E;

  const int panels = min(f.panels, (f.queries - first_query + PANEL - 1) / PANEL);
  Interval all = everything(keys);
  for (int i = 0; i < panels; ++i) {
    const int query = first_query + i * PANEL;
    read_panel(f.gate, batch, f.queries, keys, query, t.queries[i]);
    all = i ? merge(all, t.queries[i].interval) : t.queries[i].interval;
    reset(t.running[i]);
    pack_columns(q + query * f.q.token, f.q.token, t.queries[i].rows, f.head_dim, f.scale < 0 ? -1.0f : 1.0f,
                 t.q + (int64_t)i * t.depth * PANEL);
    memset(t.out + (int64_t)i * t.values * PANEL, 0, sizeof(float) * t.values * PANEL);
  }

  const KeyRanges ranges = key_ranges(all);
  for (const auto& range : ranges.part) {
    for (int first = range[0]; first < range[1]; first += TILE) {
      const int n = min(TILE, range[1] - first);
      TileFacts facts = {false, false, -1};
      for (int i = 0; i < panels; ++i) {
        if (!t.queries[i].interval.sees(first, first + n)) continue;
        if (!facts.packed) {
          facts.packed = true;
          pack_rows(k, f.k.token, kept, first, n, f.head_dim, t.depth, t.k);
          pack_values(v, f.v.token, kept, first, n, f.value_dim, t.values, t.v);
          if (gate != NO_GATE) facts.weightless = read_key_gate(f.gate, gate, batch, f.keys, first, n, t.b);
        }
        const int vectors = (t.queries[i].rows + W - 1) / W;
        if (vectors == 3) forward_panel<M, 3>(f, t, i, first, n, gate, facts, strength, factor);
        else if (vectors == 2) forward_panel<M, 2>(f, t, i, first, n, gate, facts, strength, factor);
        else forward_panel<M, 1>(f, t, i, first, n, gate, facts, strength, factor);
      }
    }
  }

  for (int i = 0; i < panels; ++i) {
    const int query = first_query + i * PANEL;
    finish_panel(f, t, i, ((int64_t)batch * f.heads + head) * f.queries + query, out + query * f.out.token);
  }
}

#if defined(GATE4D_AVX512_BF16)
using Bf16Product = Bf16Pair;
#else
using Bf16Product = Float;
#endif

int64_t forward_scratch(const AttentionForward& f) {
  Scratch count{nullptr};
  if (f.dtype == gate4d::DType::bf16) ForwardTile<Bf16Product>(f, count);
  else ForwardTile<Float>(f, count);
  return count.used;
}

void forward(const AttentionForward& f, int64_t task, void* scratch) {
  switch (f.dtype) {
    case gate4d::DType::f32:
      return forward_task<Float, float>(f, task, {(char*)scratch});
    case gate4d::DType::bf16:
      return forward_task<Bf16Product, bf16>(f, task, {(char*)scratch});
    case gate4d::DType::f16:
      return forward_task<Float, fp16>(f, task, {(char*)scratch});
  }
}

}  // namespace
