// Mean and variance per key of the attention probabilities: keys along the lanes, queries as rows.
//
// A task is one block of panels of keys of one head. For every tile of queries: logits by one matrix product,
// probabilities from the stored lse, then the tile's mean and squared deviations, merged into the panel's
// (Chan's update: squares of small probabilities would cancel). Nothing else is kept.
#pragma once

#include "gate_and_visibility.h"
#include "moments.h"

namespace {

using gate4d::ReceivedAttention;

// What a panel knows of its keys, and their moments over the queries so far.
struct PanelKeys {
  int first, rows;
  float gate[PANEL];  // b, or the weight itself or its logarithm where it depends on the key alone
  PanelMoments moments;
};

// A tile of queries: their lse and gate scores, and the bounds of what they see.
struct TileQueries {
  int rows;
  Interval interval;
  const int32_t *start, *end, *sink;  // null: everything
  float lse[TILE], shift[TILE];       // see Shift
  bool far;                           // lse is subtracted from the logits beforehand, shifts are 0
  float score[TILE];                  // a
};

void read_tile(const ReceivedAttention& f, int batch, int head, int first, TileQueries& t) {
  t.rows = min(TILE, f.queries - first);
  const float* lse = f.lse + ((int64_t)batch * f.heads + head) * f.queries + first;
  int32_t far = 0;
  const float infinity = __builtin_inff();
  for (int i = 0; i < t.rows; ++i) {  // as Shift has it, without branches
    const float x = lse[i];
    const bool dead = x == -infinity;
    t.lse[i] = dead ? infinity : x;
    t.shift[i] = dead ? -infinity : x * -LOG2E;
    far |= (x > FAR) | ((x < -FAR) & !dead);
    t.score[i] = 1.0f;
  }
  t.far = far;
  if (f.gate.query_score)
    memcpy(t.score, f.gate.query_score + (int64_t)batch * f.queries + first, sizeof(float) * t.rows);
  for (int i = 0; t.far && i < t.rows; ++i) t.shift[i] = 0;
  t.interval = everything(f.keys);
  t.start = nullptr;
  if (!f.gate.bounds) return;
  t.start = f.gate.bounds + batch * f.gate.bounds_batch + first;
  t.end = t.start + f.queries;
  t.sink = t.end + f.queries;
  t.interval = {INT32_MAX, 0, INT32_MAX, 0, INT32_MAX, 0};
  for (int i = 0; i < t.rows; ++i) {
    const int start = t.start[i], end = t.end[i], sink = t.sink[i];
    Interval one = {start, start, end, end, sink, sink};
    if (end <= start) one.start_min = INT32_MAX, one.end_max = 0;  // empty: asks for no tile
    t.interval = merge(t.interval, one);
  }
}

// Logits less lse, for tiles in which that is far. Without a weight below 1 the result is at most 0.
template <int R>
void subtract_far_lse(GateKind gate, float* s, float scale, const TileQueries& t) {
  const vf largest = set1(gate == NO_GATE ? 0.0f : __builtin_inff());
  for (int i = 0; i < t.rows; ++i) {
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* at = s + i * PANEL + r * W;
      store(at, min(largest, rounded(load(at) * scale) - set1(t.lse[i])));
    }
  }
}

// Logits to probabilities, in place, and their sums over the tile's queries. `scale` is that of the logits, in units of
// log2 unless the weights fold.
template <int R, GateKind GATE>
void to_probabilities(float* s, float scale, const TileQueries& t, bool masked, const PanelKeys& p,
                      const Power& strength, vf (&total)[R]) {
  int32_t lane[W];
  for (int i = 0; i < W; ++i) lane[i] = p.first + i;
  vi key[R];
  vf gate[R];
  GATE4D_UNROLL for (int r = 0; r < R; ++r) {
    key[r] = load(lane) + r * W;
    gate[r] = load(p.gate + r * W);
    total[r] = vf{};
  }
  for (int i = 0; i < t.rows; ++i) {
    const vf shift = set1(folds(GATE) ? t.lse[i] : t.shift[i]);
    GATE4D_UNROLL for (int r = 0; r < R; ++r) {
      float* at = s + i * PANEL + r * W;
      const vf base = GATE < PAIR_GATE ? gate[r] : one_minus_product(gate[r], set1(t.score[i]));
      vf x;
      if (folds(GATE)) {
        const vf logit = fma(load(at), set1(scale), GATE == KEY_FOLD ? base : log_weight(base, strength));
        x = exp2(min(vf{}, (logit - shift) * LOG2E));
      } else {
        x = exp2(fma(load(at), set1(scale), shift));
      }
      if (GATE != NO_GATE && !folds(GATE)) {
        const vf w = GATE == KEY_GATE ? base : pair_weight<GATE>(base, strength);
        x = select(w > 0.0f, x * w, vf{});  // the exponential may overflow where the weight is 0
      }
      if (masked) {
        const vi seen = (key[r] < t.sink[i]) | ((key[r] >= t.start[i]) & (key[r] < t.end[i]));
        x = select(seen, x, vf{});
      }
      total[r] += x;
      store(at, x);
    }
  }
}

// The pieces of a task's scratch.
template <class M>
struct ReceivedTile {
  using Elem = typename M::Elem;
  int depth;    // elements of a packed query
  Elem *k, *q;  // [panels][depth][PANEL], [TILE][depth]
  float* s;     // [TILE][PANEL]
  PanelKeys* keys;
  TileQueries* queries;

  ReceivedTile(const ReceivedAttention& f, Scratch& scratch) : depth((f.head_dim + M::pack - 1) / M::pack) {
    k = scratch.take<Elem>((int64_t)f.panels * depth * PANEL);
    q = scratch.take<Elem>((int64_t)TILE * depth);
    s = scratch.take<float>((int64_t)TILE * PANEL);
    keys = scratch.take<PanelKeys>(f.panels);
    queries = scratch.take<TileQueries>(1);
  }
};

template <class M, int R>
void receive_panel(const ReceivedTile<M>& t, const typename M::Elem* k, GateKind gate, const Power& strength,
                   float scale, PanelKeys& p) {
  const TileQueries& tile = *t.queries;
  const bool masked = tile.start && !tile.interval.sees_all(p.first, p.first + p.rows);
  gemm_rows<M, R>(t.q, t.depth, 1, k, PANEL, t.s, PANEL, round_up(tile.rows, J), t.depth, false);
  vf total[R];
  if (!folds(gate)) {
    if (tile.far) subtract_far_lse<R>(gate, t.s, scale, tile);
    scale = tile.far ? LOG2E : scale * LOG2E;
  }
  if (gate == NO_GATE) to_probabilities<R, NO_GATE>(t.s, scale, tile, masked, p, strength, total);
  else if (gate == KEY_GATE) to_probabilities<R, KEY_GATE>(t.s, scale, tile, masked, p, strength, total);
  else if (gate == KEY_FOLD) to_probabilities<R, KEY_FOLD>(t.s, scale, tile, masked, p, strength, total);
  else if (gate == PAIR_GATE) to_probabilities<R, PAIR_GATE>(t.s, scale, tile, masked, p, strength, total);
  else if (gate == PAIR_FOLD) to_probabilities<R, PAIR_FOLD>(t.s, scale, tile, masked, p, strength, total);
  else to_probabilities<R, PAIR_POWER_GATE>(t.s, scale, tile, masked, p, strength, total);
  merge_tile<R>(t.s, tile.rows, total, p.moments);
}

template <class M, class T>
void received_task(const ReceivedAttention& f, int64_t task, Scratch scratch) {
  const ReceivedTile<M> t(f, scratch);
  const int block = f.panels * PANEL, blocks = (f.keys + block - 1) / block;
  const int first_key = (int)(task % blocks) * block;  // early keys are seen by most queries
  const int head = (int)(task / blocks % f.heads), batch = (int)(task / blocks / f.heads);
  const T* q = (const T*)f.q.data + batch * f.q.batch + head * f.q.head;
  const T* k = (const T*)f.k.data + batch * f.k.batch + head * f.k.head;
  const GateKind gate = kind_of(f.gate);
  const float* key_gate = gate < PAIR_GATE ? f.gate.key_weight : f.gate.key_score;
  const Power strength(f.gate.strength);
  const float scale = magnitude(f.scale);

  const int panels = min(f.panels, (f.keys - first_key + PANEL - 1) / PANEL);
  for (int i = 0; i < panels; ++i) {
    PanelKeys& p = t.keys[i];
    memset(&p, 0, sizeof p);
    p.first = first_key + i * PANEL;
    p.rows = min(PANEL, f.keys - p.first);
    for (int j = 0; gate != NO_GATE && j < p.rows; ++j) p.gate[j] = key_gate[(int64_t)batch * f.keys + p.first + j];
    pack_columns(k + p.first * f.k.token, f.k.token, p.rows, f.head_dim, f.scale < 0 ? -1.0f : 1.0f,
                 t.k + (int64_t)i * t.depth * PANEL);
  }

  for (int first = 0; first < f.queries; first += TILE) {
    read_tile(f, batch, head, first, *t.queries);
    const TileQueries& tile = *t.queries;
    bool packed = false;
    for (int i = 0; i < panels; ++i) {
      PanelKeys& p = t.keys[i];
      if (!tile.interval.sees(p.first, p.first + p.rows)) continue;  // counted as zeros at the end
      if (!packed) pack_rows(q, f.q.token, nullptr, first, tile.rows, f.head_dim, t.depth, t.q);
      packed = true;
      const typename M::Elem* columns = t.k + (int64_t)i * t.depth * PANEL;
      const int vectors = (p.rows + W - 1) / W;
      if (vectors == 3) receive_panel<M, 3>(t, columns, gate, strength, scale, p);
      else if (vectors == 2) receive_panel<M, 2>(t, columns, gate, strength, scale, p);
      else receive_panel<M, 1>(t, columns, gate, strength, scale, p);
    }
  }

  for (int i = 0; i < panels; ++i) {
    const PanelKeys& p = t.keys[i];
    const int64_t at = ((int64_t)batch * f.heads + head) * f.keys + p.first;
    const PanelMoments& m = p.moments;
    const float share = (float)m.count / (float)f.queries, zeros = (float)(f.queries - m.count);
    for (int j = 0; j < p.rows; ++j) {
      f.mean[at + j] = m.mean[j] * share;
      f.m2[at + j] = m.m2[j] + m.mean[j] * m.mean[j] * zeros * share;
    }
  }
}

int64_t received_scratch(const ReceivedAttention& f) {
  Scratch count{nullptr};
  if (f.dtype == gate4d::DType::bf16) ReceivedTile<Bf16Product>(f, count);
  else ReceivedTile<Float>(f, count);
  return count.used;
}

void received(const ReceivedAttention& f, int64_t task, void* scratch) {
  switch (f.dtype) {
    case gate4d::DType::f32:
      return received_task<Float, float>(f, task, {(char*)scratch});
    case gate4d::DType::bf16:
      return received_task<Bf16Product, bf16>(f, task, {(char*)scratch});
    case gate4d::DType::f16:
      return received_task<Float, fp16>(f, task, {(char*)scratch});
  }
}

}  // namespace
