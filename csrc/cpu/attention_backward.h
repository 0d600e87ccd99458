// Gated attention, backward: probabilities recomputed from lse, five matrix products per tile, all in fp32.
//
// A task is one head, or a chunk of its keys where there are few heads. Queries are taken in
// blocks of panels, whose gradient stays in the task's scratch; gradients of keys and values are added row by
// row. With P the gated probabilities, dP = V dO and D_i = dO_i . O_i - dlse_i:
//     renormalised      dS = P (dP - D),          d weight = E (dP - D)     E = exp(s - lse), P = w E
//     not renormalised  dS = E (w dP - D),        d weight = E dP
#pragma once

#include "gate_and_visibility.h"

namespace {

using gate4d::AttentionBackward;

constexpr float LARGEST_EXPONENT = 115.0f;  // a key of weight 0 may have any logit: keep its exponential finite

struct PanelGrad {
  float lse[PANEL], shift[PANEL], shift_rest[PANEL];  // see Shift
  float delta[PANEL];                                 // D
  float score[PANEL];                                 // gradient of a
  bool far;                                           // lse is subtracted from the logits beforehand, shifts are 0
  bool finite;  // no NaN or infinity in what is read of the queries; looked at where keys can be invisible
};

struct BackwardTile {
  int depth, values;               // features of a packed key and value row, multiples of J and W
  float *q, *grad_out;             // [panels][depth or values][PANEL], queries along the lanes
  float *q_rows, *grad_rows;       // [panels][PANEL][depth or values], features along the lanes
  float* grad_q;                   // [panels][depth][PANEL]
  float *k, *v, *grad_k, *grad_v;  // [TILE][depth or values]
  float *p, *ds;                   // [TILE][PANEL]
  float *b, *grad_b;               // [TILE], [TILE][W]
  float *sum_k, *sum_v;            // [keys of the chunk][D or Dv], for 16-bit gradients
  PanelQueries* queries;
  PanelGrad* grads;

  BackwardTile(const AttentionBackward& f, int chunk, Scratch& scratch)
      : depth(round_up(f.head_dim, max(J, W))), values(round_up(f.value_dim, max(J, W))) {
    const int64_t panels = f.panels;
    q = scratch.take<float>(panels * depth * PANEL);
    grad_out = scratch.take<float>(panels * values * PANEL);
    q_rows = scratch.take<float>(panels * PANEL * depth);
    grad_rows = scratch.take<float>(panels * PANEL * values);
    grad_q = scratch.take<float>(panels * depth * PANEL);
    k = scratch.take<float>((int64_t)TILE * depth);
    v = scratch.take<float>((int64_t)TILE * values);
    grad_k = scratch.take<float>((int64_t)TILE * depth);
    grad_v = scratch.take<float>((int64_t)TILE * values);
    p = scratch.take<float>((int64_t)TILE * PANEL);
    ds = scratch.take<float>((int64_t)TILE * PANEL);
    b = scratch.take<float>(TILE);
    grad_b = scratch.take<float>((int64_t)TILE * W);
    queries = scratch.take<PanelQueries>(panels);
    grads = scratch.take<PanelGrad>(panels);
    const bool sums = f.dtype != gate4d::DType::f32;
    sum_k = scratch.take<float>(sums ? (int64_t)chunk * f.head_dim : 0);
    sum_v = scratch.take<float>(sums ? (int64_t)chunk * f.value_dim : 0);
  }
};

// Logits less lse, for rows in which that is far. Without a weight below 1 the result is at most 0.
template <int R>
void subtract_far_lse(GateKind gate, float* s, int n, float scale, const PanelGrad& grad) {
  const vf largest = set1(gate == NO_GATE ? 0.0f : __builtin_inff());
  for (int j = 0; j < n; ++j) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* at = s + j * PANEL + r * W;
      store(at, min(largest, rounded(load(at) * scale) - load(grad.lse + r * W)));
    }
  }
}

// Logits and dP to P and dS, in place; gradients of the gate's scores where asked for. `scale` is that of the logits,
// in units of log2 unless the weights fold.
template <int R, GateKind GATE, bool RENORMALIZE, bool SCORES>
void differentiate(float* s, float* dp, int n, float scale, const float* b, const PanelQueries& panel, PanelGrad& grad,
                   float* grad_b, const Power& strength) {
  vf shift[R], rest[R], delta[R], a[R], score[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    shift[r] = load((folds(GATE) ? grad.lse : grad.shift) + r * W);
    rest[r] = load(grad.shift_rest + r * W);
    delta[r] = load(grad.delta + r * W);
    if (GATE >= PAIR_GATE) a[r] = load(panel.score + r * W);
    if (SCORES) score[r] = vf{};
  }
  const vf largest = set1(folds(GATE) ? 0 : LARGEST_EXPONENT);
  for (int j = 0; j < n; ++j) {
    vf key_grad = {};
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* const sj = s + j * PANEL + r * W;
      float* const dpj = dp + j * PANEL + r * W;
      const vf g = load(dpj);
      const vf base = GATE < PAIR_GATE ? set1(b[j]) : one_minus_product(a[r], set1(b[j]));
      vf log;
      if (folds(GATE)) {
        const vf logit = fma(load(sj), set1(scale), GATE == KEY_FOLD ? base : log_weight(base, strength));
        log = (logit - shift[r]) * LOG2E;
      } else {
        log = fma(load(sj), set1(scale), shift[r]) + rest[r];
      }
      const vf e = exp2(GATE == NO_GATE ? log : min(largest, log));
      if (GATE == NO_GATE || folds(GATE)) {
        const vf ds = e * (g - delta[r]);
        store(sj, e);
        store(dpj, ds);
        if (!SCORES) continue;
        if (GATE == KEY_FOLD) {
          key_grad += ds;
        } else if (GATE == PAIR_FOLD) {
          const vf slope = select(base > 0.0f, ds / base * strength.exponent, vf{});
          key_grad = fma(slope, -a[r], key_grad);
          score[r] = fma(slope, set1(-b[j]), score[r]);
        }
        continue;
      }
      const vf w = pair_weight<GATE>(base, strength);
      // The weight first: where it is 0 the exponential may be large, and its product with a gradient infinite.
      const vf p = w * e, inner = RENORMALIZE ? g - delta[r] : g;
      store(sj, p);
      store(dpj, RENORMALIZE ? p * inner : e * fma(w, g, -delta[r]));
      if (!SCORES) continue;
      if (GATE == KEY_GATE) {
        key_grad += e * inner;
        continue;
      }
      vf slope = e * inner;  // gradient of a * b, up to its sign
      if (GATE == PAIR_POWER_GATE) slope = select(base > 0.0f, p * inner / base * strength.exponent, vf{});
      key_grad = fma(slope, -a[r], key_grad);
      score[r] = fma(slope, set1(-b[j]), score[r]);
    }
    if (SCORES) store(grad_b + j * W, load(grad_b + j * W) + key_grad);
  }
  if (SCORES) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) store(grad.score + r * W, load(grad.score + r * W) + score[r]);
  }
}

template <int R>
void differentiate_by_gate(GateKind gate, bool renormalize, bool scores, float* s, float* dp, int n, float scale,
                           const float* b, const PanelQueries& panel, PanelGrad& grad, float* grad_b,
                           const Power& strength) {
#define GATE4D_CALL(kind, renorm, with_scores) \
  differentiate<R, kind, renorm, with_scores>(s, dp, n, scale, b, panel, grad, grad_b, strength)
#define GATE4D_CASE(kind)                                                                            \
  case kind:                                                                                         \
    if (renormalize) return scores ? GATE4D_CALL(kind, true, true) : GATE4D_CALL(kind, true, false); \
    return scores ? GATE4D_CALL(kind, false, true) : GATE4D_CALL(kind, false, false);
  switch (gate) {
    GATE4D_CASE(KEY_GATE)
    GATE4D_CASE(PAIR_GATE)
    GATE4D_CASE(PAIR_POWER_GATE)
    case KEY_FOLD:
      return scores ? GATE4D_CALL(KEY_FOLD, true, true) : GATE4D_CALL(KEY_FOLD, true, false);
    case PAIR_FOLD:
      return scores ? GATE4D_CALL(PAIR_FOLD, true, true) : GATE4D_CALL(PAIR_FOLD, true, false);
    default:
      GATE4D_CALL(NO_GATE, true, false);
  }
#undef GATE4D_CASE
#undef GATE4D_CALL
}

// C[rows][features] += A[rows][queries] * B[queries][features] with features along the lanes.
void add_features(const float* a, const float* b, float* c, int rows, int queries, int features) {
  for (int d = 0; d < features;) {
    const int left = (features - d) / W;
    const int r = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;  // four vectors: two and two
    if (r == 3) gemm_rows<Float, 3>(a, PANEL, 1, b + d, features, c + d, features, rows, queries, true);
    else if (r == 2) gemm_rows<Float, 2>(a, PANEL, 1, b + d, features, c + d, features, rows, queries, true);
    else gemm_rows<Float, 1>(a, PANEL, 1, b + d, features, c + d, features, rows, queries, true);
    d += r * W;
  }
}

// differentiate_by_gate key by key, with the queries that do not see a key taken out: a NaN of theirs would come
// through its product with their probability of 0. For tiles in which that can happen.
template <int R>
void differentiate_seen(GateKind gate, bool renormalize, bool scores, float* s, float* dp, int n, int first,
                        float scale, const float* b, const PanelQueries& panel, PanelGrad& grad, float* grad_b,
                        const Power& strength) {
  const Seen<R> seen(panel);
  PanelGrad one = grad;
  for (int j = 0; j < n; ++j) {
    for (int r = 0; r < R; ++r) {
      const vi sees = seen(r, first + j);
      store(one.lse + r * W, select(sees, load(grad.lse + r * W), set1(__builtin_inff())));
      store(one.shift + r * W, select(sees, load(grad.shift + r * W), set1(-__builtin_inff())));
      store(one.shift_rest + r * W, select(sees, load(grad.shift_rest + r * W), vf{}));
      store(one.delta + r * W, select(sees, load(grad.delta + r * W), vf{}));
    }
    differentiate_by_gate<R>(gate, renormalize, scores, s + j * PANEL, dp + j * PANEL, 1, scale, b + j, panel, one,
                             grad_b + j * W, strength);
  }
  memcpy(grad.score, one.score, sizeof grad.score);
}

// Gradients of keys and values row by row, without the queries that do not see the key.
void add_seen_rows(const BackwardTile& t, const float* q_rows, const float* grad_rows, int n, int first,
                   const PanelQueries& panel) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < panel.rows; ++i) {
      const int key = first + j;
      if (key >= panel.sink[i] && (key < panel.start[i] || key >= panel.end[i])) continue;
      const vf ds = set1(t.ds[j * PANEL + i]), p = set1(t.p[j * PANEL + i]);
      float *k = t.grad_k + (int64_t)j * t.depth, *v = t.grad_v + (int64_t)j * t.values;
      for (int d = 0; d < t.depth; d += W) store(k + d, fma(ds, load(q_rows + i * t.depth + d), load(k + d)));
      for (int d = 0; d < t.values; d += W) store(v + d, fma(p, load(grad_rows + i * t.values + d), load(v + d)));
    }
}

template <int R>
void backward_panel(const AttentionBackward& f, const BackwardTile& t, int i, int first, int n, GateKind gate,
                    int& keys_finite, const Power& strength) {
  float scale = magnitude(f.scale);
  const bool scores = f.grad_key_weight != nullptr;
  const PanelQueries& panel = t.queries[i];
  const int64_t q = (int64_t)i * t.depth * PANEL, v = (int64_t)i * t.values * PANEL;
  const int rows = round_up(n, J);
  gemm_rows<Float, R>(t.k, t.depth, 1, t.q + q, PANEL, t.p, PANEL, rows, f.head_dim, false);
  gemm_rows<Float, R>(t.v, t.values, 1, t.grad_out + v, PANEL, t.ds, PANEL, rows, f.value_dim, false);
  if (!folds(gate)) {
    if (t.grads[i].far) subtract_far_lse<R>(gate, t.p, n, scale, t.grads[i]);
    scale = t.grads[i].far ? LOG2E : scale * LOG2E;
  }
  const bool hides = !panel.interval.sees_all(first, first + n);
  if (hides) hide_invisible<R>(t.p, t.ds, n, first, panel);
  if (hides && keys_finite < 0) keys_finite = all_finite(t.k, (int64_t)n * t.depth);
  const bool by_row = hides && !t.grads[i].finite;
  if (by_row)
    differentiate_seen<R>(gate, f.gate.renormalize, scores, t.p, t.ds, n, first, scale, t.b, panel, t.grads[i],
                          t.grad_b, strength);
  else
    differentiate_by_gate<R>(gate, f.gate.renormalize, scores, t.p, t.ds, n, scale, t.b, panel, t.grads[i], t.grad_b,
                             strength);
  if (hides && !keys_finite) add_seen<Float, R>(t.k, t.depth, t.ds, n, f.head_dim, first, panel, t.grad_q + q);
  else gemm_rows<Float, R>(t.k, 1, t.depth, t.ds, PANEL, t.grad_q + q, PANEL, round_up(f.head_dim, J), n, true);
  if (by_row) return add_seen_rows(t, t.q_rows + q, t.grad_rows + v, n, first, panel);
  add_features(t.ds, t.q_rows + q, t.grad_k, rows, panel.rows, t.depth);
  add_features(t.p, t.grad_rows + v, t.grad_v, rows, panel.rows, t.values);
}

// Term by term, as the matrix product sums dP: where a query sees one key the two must cancel.
template <class T>
float dot(const float* a, const T* b, int n) {
  float total = 0;
  for (int i = 0; i < n; ++i) total += a[i] * to_float(b[i]);
  return total;
}

template <class T>
void read_block(const AttentionBackward& f, const BackwardTile& t, int batch, int head, int i, int query) {
  const T* q = (const T*)f.q.data + batch * f.q.batch + head * f.q.head + query * f.q.token;
  const T* grad =
      (const T*)f.grad_out.data + batch * f.grad_out.batch + head * f.grad_out.head + query * f.grad_out.token;
  const T* out = (const T*)f.out.data + batch * f.out.batch + head * f.out.head + query * f.out.token;
  const int64_t row = ((int64_t)batch * f.heads + head) * f.queries + query;
  const int64_t at_q = (int64_t)i * t.depth * PANEL, at_v = (int64_t)i * t.values * PANEL;
  const int rows = t.queries[i].rows;
  const float sign = f.scale < 0 ? -1.0f : 1.0f;
  pack_columns(q, f.q.token, rows, f.head_dim, sign, t.q + at_q);
  pack_columns(grad, f.grad_out.token, rows, f.value_dim, 1.0f, t.grad_out + at_v);
  pack_rows(q, f.q.token, nullptr, 0, rows, f.head_dim, t.depth, t.q_rows + at_q);
  pack_rows(grad, f.grad_out.token, nullptr, 0, rows, f.value_dim, t.values, t.grad_rows + at_v);
  memset(t.grad_q + at_q, 0, sizeof(float) * t.depth * PANEL);
  PanelGrad& g = t.grads[i];
  g.far = false;
  for (int j = 0; j < PANEL; ++j) {
    const Shift shift(j < rows ? f.lse[row + j] : -__builtin_inff());
    g.lse[j] = shift.lse, g.shift[j] = shift.base2, g.shift_rest[j] = shift.base2_rest;
    g.far |= shift.far;
    g.score[j] = g.delta[j] = 0;
    if (j >= rows) continue;
    g.delta[j] = dot(t.grad_rows + at_v + (int64_t)j * t.values, out + j * f.out.token, f.value_dim) -
                 (f.grad_lse ? f.grad_lse[row + j] : 0);
  }
  for (int j = 0; g.far && j < PANEL; ++j) g.shift[j] = g.shift_rest[j] = 0;
  g.finite = true;
  if (!f.gate.bounds) return;
  for (int j = 0; j < rows; ++j) g.finite &= g.lse[j] == g.lse[j] && g.delta[j] - g.delta[j] == 0;
  g.finite = g.finite && all_finite(t.q_rows + at_q, (int64_t)rows * t.depth) &&
             all_finite(t.grad_rows + at_v, (int64_t)rows * t.values);
}

// to[row][d] += factor * from[row][d]
void add_row(const float* from, float factor, int dim, float* to) {
  int d = 0;
  for (; d + W <= dim; d += W) store(to + d, fma(load(from + d), set1(factor), load(to + d)));
  for (; d < dim; ++d) to[d] += factor * from[d];
}

GATE4D_INLINE float* row_of(float* grad, float*, int64_t, int64_t row, int64_t stride) { return grad + row * stride; }
template <class T>
GATE4D_INLINE float* row_of(T*, float* sums, int64_t local, int64_t, int64_t dim) {
  return sums + local * dim;
}

template <class T>
void backward_task(const AttentionBackward& f, int64_t task, Scratch scratch) {
  const int chunk = (f.keys + f.chunks - 1) / f.chunks;
  const BackwardTile t(f, chunk, scratch);
  const int part = (int)(task % f.chunks), head = (int)(task / f.chunks % f.heads);
  const int batch = (int)(task / f.chunks / f.heads);
  const T* k = (const T*)f.k.data + batch * f.k.batch + head * f.k.head;
  const T* v = (const T*)f.v.data + batch * f.v.batch + head * f.v.head;
  T* grad_k = (T*)f.grad_k.data + batch * f.grad_k.batch + head * f.grad_k.head;
  T* grad_v = (T*)f.grad_v.data + batch * f.grad_v.batch + head * f.grad_v.head;
  const int32_t* kept = f.gate.kept ? f.gate.kept + (int64_t)batch * f.keys : nullptr;
  const int keys = kept ? f.gate.kept_count[batch] : f.keys;
  const int chunk_first = part * chunk, chunk_last = min(keys, chunk_first + chunk);
  const GateKind gate = kind_of(f.gate);
  const Power strength(f.gate.strength);
  const bool sums = f.dtype != gate4d::DType::f32;
  if (sums) {
    memset(t.sum_k, 0, sizeof(float) * chunk * f.head_dim);
    memset(t.sum_v, 0, sizeof(float) * chunk * f.value_dim);
  }

  for (int block = 0; block < f.queries; block += f.panels * PANEL) {
    const int panels = min(f.panels, (f.queries - block + PANEL - 1) / PANEL);
    Interval all = everything(keys);
    for (int i = 0; i < panels; ++i) {
      read_panel(f.gate, batch, f.queries, keys, block + i * PANEL, t.queries[i]);
      all = i ? merge(all, t.queries[i].interval) : t.queries[i].interval;
      read_block<T>(f, t, batch, head, i, block + i * PANEL);
    }
    const KeyRanges ranges = key_ranges(all);
    for (const auto& range : ranges.part) {
      const int last = min(range[1], chunk_last);
      for (int first = max(range[0], chunk_first); first < last; first += TILE) {
        const int n = min(TILE, last - first);
        bool packed = false;
        int keys_finite = -1;
        for (int i = 0; i < panels; ++i) {
          if (!t.queries[i].interval.sees(first, first + n)) continue;
          if (!packed) {
            packed = true;
            pack_rows(k, f.k.token, kept, first, n, f.head_dim, t.depth, t.k);
            pack_rows(v, f.v.token, kept, first, n, f.value_dim, t.values, t.v);
            memset(t.grad_k, 0, sizeof(float) * TILE * t.depth);
            memset(t.grad_v, 0, sizeof(float) * TILE * t.values);
            memset(t.grad_b, 0, sizeof(float) * TILE * W);
            if (gate != NO_GATE) read_key_gate(f.gate, gate, batch, f.keys, first, n, t.b);
          }
          const int vectors = (t.queries[i].rows + W - 1) / W;
          if (vectors == 3) backward_panel<3>(f, t, i, first, n, gate, keys_finite, strength);
          else if (vectors == 2) backward_panel<2>(f, t, i, first, n, gate, keys_finite, strength);
          else backward_panel<1>(f, t, i, first, n, gate, keys_finite, strength);
        }
        for (int j = 0; packed && j < n; ++j) {
          const int64_t row = kept ? kept[first + j] : first + j, local = first + j - chunk_first;
          add_row(t.grad_k + (int64_t)j * t.depth, f.scale, f.head_dim,
                  row_of(grad_k, t.sum_k, local, row, sums ? f.head_dim : f.grad_k.token));
          add_row(t.grad_v + (int64_t)j * t.values, 1.0f, f.value_dim,
                  row_of(grad_v, t.sum_v, local, row, sums ? f.value_dim : f.grad_v.token));
          if (f.grad_key_weight)
            f.grad_key_weight[((int64_t)batch * f.heads + head) * f.keys + row] += sum(load(t.grad_b + j * W));
        }
      }
    }
    float scale[PANEL];
    for (float& x : scale) x = f.scale;
    for (int i = 0; i < panels; ++i) {
      const int query = block + i * PANEL, rows = t.queries[i].rows;
      const int64_t row = (((int64_t)part * f.batch + batch) * f.heads + head) * f.queries + query;
      const float* from = t.grad_q + (int64_t)i * t.depth * PANEL;
      if (f.grad_query_score) memcpy(f.grad_query_score + row, t.grads[i].score, sizeof(float) * rows);
      if (f.grad_q_parts) {
        unpack_columns(from, scale, rows, f.head_dim, f.grad_q_parts + row * f.head_dim, f.head_dim);
      } else {
        T* to = (T*)f.grad_q.data + batch * f.grad_q.batch + head * f.grad_q.head + query * f.grad_q.token;
        unpack_columns(from, scale, rows, f.head_dim, to, f.grad_q.token);
      }
    }
  }

  for (int j = chunk_first; sums && j < chunk_last; ++j) {
    const int64_t row = kept ? kept[j] : j, local = j - chunk_first;
    store_row(t.sum_k + local * f.head_dim, f.head_dim, grad_k + row * f.grad_k.token);
    store_row(t.sum_v + local * f.value_dim, f.value_dim, grad_v + row * f.grad_v.token);
  }
}

// Adds the chunks' gradients of the queries in a fixed order.
template <class T>
void sum_parts_as(const AttentionBackward& f) {
  const int64_t rows = (int64_t)f.batch * f.heads * f.queries;
  for (int64_t row = 0; row < rows; ++row) {
    float* sum = f.grad_q_parts + row * f.head_dim;
    for (int part = 1; part < f.chunks; ++part) add_row(sum + part * rows * f.head_dim, 1.0f, f.head_dim, sum);
    const int64_t head = row / f.queries;
    T* to = (T*)f.grad_q.data + head / f.heads * f.grad_q.batch + head % f.heads * f.grad_q.head +
            row % f.queries * f.grad_q.token;
    store_row(sum, f.head_dim, to);
  }
}

void sum_parts(const AttentionBackward& f) {
  switch (f.dtype) {
    case gate4d::DType::f32:
      return sum_parts_as<float>(f);
    case gate4d::DType::bf16:
      return sum_parts_as<bf16>(f);
    case gate4d::DType::f16:
      return sum_parts_as<fp16>(f);
  }
}

int64_t backward_scratch(const AttentionBackward& f) {
  Scratch count{nullptr};
  BackwardTile(f, (f.keys + f.chunks - 1) / f.chunks, count);
  return count.used;
}

void backward(const AttentionBackward& f, int64_t task, void* scratch) {
  switch (f.dtype) {
    case gate4d::DType::f32:
      return backward_task<float>(f, task, {(char*)scratch});
    case gate4d::DType::bf16:
      return backward_task<bf16>(f, task, {(char*)scratch});
    case gate4d::DType::f16:
      return backward_task<fp16>(f, task, {(char*)scratch});
  }
}

}  // namespace
