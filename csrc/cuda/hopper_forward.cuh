// Forward of gated attention for Hopper, an experiment beside the Triton kernel. It has not run on a GPU.
//
// A block has 128 queries of one head and three warpgroups. Of the first a single thread works: it has the copy engine
// bring tiles of 128 keys and values into a ring in shared memory. The other two have 64 queries each and do the rest:
// while the product of one tile's probabilities with its values runs, the next tile's logits become probabilities.
//
// The instructions are functions (hopper_ptx.cuh), included before this file: the tests compile it for the CPU with
// others of the same names and run whole blocks, thread by thread. Layouts are those of the PTX manual: tiles in shared
// memory are boxes of 64 features, 128 bytes a row, swizzled by 128 bytes; `product` takes and leaves its registers in
// the fragments of wgmma.m64nNk16, where register i of a lane is
//     row lane / 4 + 8 * (i / 2 % 2) of its warp's 16,    column 8 * (i / 4) + 2 * (lane % 4) + i % 2,
// and four of them in a row, packed in pairs, are the fragment of 16 columns that the next product wants.

#pragma once

#include <cstdint>
#include <type_traits>

namespace gate4d::hopper {

constexpr int BLOCK_M = 128, BLOCK_N = 128, THREADS = 384;
constexpr int BOX = 64, BOX_BYTES = 128 * 2 * BOX;     // features of a box; 128 rows of them
constexpr int SCORES = BLOCK_N + 4;                    // key scores of a tile, their maximum, three to fill 16 bytes
constexpr int CONSUMER_WARPS = 8;
constexpr float LN2_HIGH = 0.693147182464599609375f, LN2_LOW = -1.904654299957768e-09f;
constexpr float INFINITE = __builtin_huge_valf();

enum Gate { NONE = 0, KEYS = 1, PAIRS = 2 };

struct Forward {
  TensorMap q, k, v;         // [B, H, N, D], boxes of 64 features and 128 tokens
  const float* query_score;  // [B, Nq]; of PAIRS
  const float* key_scores;   // [B, tiles of keys, SCORES]; of KEYS and PAIRS
  const int* bounds;         // [1 or B, 3, Nq] start, end, sink_end, or null: everything is visible
  const int* reach;          // [1 or B, 6, tiles of queries], see triton_common.py; with bounds
  void* out;                 // [B, H, Nq, D]
  float* lse;                // [B, H, Nq]
  int64_t out_batch, out_head, out_token, bounds_batch, reach_batch;  // strides
  int heads, queries, keys;
  float exponent_scale;  // > 0, to base 2
};

struct Place {  // of a block
  int tile, head, batch;
};

// Where things lie in shared memory, in bytes.
template <int D>
struct Memory {
  static constexpr int STAGES = D == 64 ? 4 : 2;
  static constexpr int TILE = D / BOX * BOX_BYTES;
  static constexpr int Q = 0, K = TILE, V = K + STAGES * TILE, SCORE = V + STAGES * TILE;
  static constexpr int BARRIER = SCORE + STAGES * SCORES * 4;
  static constexpr int BYTES = BARRIER + 8 * (1 + 4 * STAGES);

  static GATE4D_DEVICE uint32_t q_full(uint32_t m) { return m + BARRIER; }
  static GATE4D_DEVICE uint32_t k_full(uint32_t m, int stage) { return m + BARRIER + 8 * (1 + stage); }
  static GATE4D_DEVICE uint32_t k_empty(uint32_t m, int stage) { return k_full(m, stage + STAGES); }
  static GATE4D_DEVICE uint32_t v_full(uint32_t m, int stage) { return k_full(m, stage + 2 * STAGES); }
  static GATE4D_DEVICE uint32_t v_empty(uint32_t m, int stage) { return k_full(m, stage + 3 * STAGES); }
};

// The tiles of keys that a tile of queries visits, and where no row needs a mask.
struct Span {
  int sink_tiles, first, count, all_low, all_high, all_far;

  GATE4D_DEVICE Span(const Forward& f, const Place& p)
      : sink_tiles(0), first(0), count((f.keys + BLOCK_N - 1) / BLOCK_N), all_low(0), all_high(f.keys), all_far(0) {
    if (f.bounds == nullptr) return;
    const int tiles = (f.queries + BLOCK_M - 1) / BLOCK_M;
    const int* r = f.reach + p.batch * f.reach_batch + p.tile;
    const int far_tiles = (r[2 * tiles] + BLOCK_N - 1) / BLOCK_N, end = (r[tiles] + BLOCK_N - 1) / BLOCK_N;
    first = r[0] / BLOCK_N;
    sink_tiles = min(far_tiles, first);
    count = sink_tiles + max(end - first, 0);
    all_low = r[3 * tiles], all_high = r[4 * tiles], all_far = r[5 * tiles];
  }
  GATE4D_DEVICE int tile(int step) const { return step < sink_tiles ? step : step - sink_tiles + first; }
  GATE4D_DEVICE bool partial(int n0, int keys) const {
    const bool seen = (n0 >= all_low && n0 + BLOCK_N <= all_high) || n0 + BLOCK_N <= all_far;
    return n0 + BLOCK_N > keys || !seen;
  }
};

// A matrix in shared memory as wgmma reads it, swizzled by 128 bytes: the next 8 rows of 128 bytes are 1024 further on,
// the next box (of a matrix with its columns first) BOX_BYTES.
GATE4D_DEVICE uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(BOX_BYTES >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

// logits[64 x 128] of a warpgroup's queries and a tile of keys: 16 features, 32 bytes of a row, at a time.
template <class T, int D>
GATE4D_DEVICE void logits(float (&s)[64], uint32_t q, uint32_t k) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int at = i * 16 / BOX * BOX_BYTES + i * 32 % 128;
    product(T(), s, descriptor(q + at), descriptor(k + at), i > 0);
  }
}

// out[64 x D] += p[64 x 128] of a tile and its values: 16 keys, 16 rows of 128 bytes, at a time.
template <class T, int D>
GATE4D_DEVICE void accumulate(float (&o)[D / 2], const uint32_t (&p)[32], uint32_t v) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 16; ++i) product(T(), o, p + 4 * i, descriptor(v + i * 16 * 128));
}

// What one thread knows of its two rows, and the softmax over tiles in whatever order they come.
template <class T, int GATE>
struct Rows {
  // Keeps small gated probabilities inside the range of fp16; the sum has the same factor.
  static constexpr float SHIFT = GATE != NONE && std::is_same<T, fp16>::value ? 14.0f : 0.0f;

  int first, column;  // first row, the other is 8 further on; first of a pair of columns, others are 8 further on
  int start[2], end[2], sink[2];
  float minus_score[2], top[2], total[2], rescale[2];

  GATE4D_DEVICE Rows(const Forward& f, const Place& p, int thread)
      : first(p.tile * BLOCK_M + (thread / 128 - 1) * 64 + thread / 32 % 4 * 16 + thread % 32 / 4),
        column(2 * (thread % 4)) {
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r;
      const bool inside = row < f.queries;
      minus_score[r] = -1.0f, top[r] = -INFINITE, total[r] = 0.0f;
      if (GATE == PAIRS) minus_score[r] = inside ? -f.query_score[(int64_t)p.batch * f.queries + row] : 0.0f;
      start[r] = 0, end[r] = f.keys, sink[r] = 0;
      if (f.bounds == nullptr) continue;
      const int* b = f.bounds + p.batch * f.bounds_batch + row;
      start[r] = inside ? b[0] : 0;
      end[r] = inside ? min(b[f.queries], f.keys) : 0;
      sink[r] = inside ? min(b[2 * (int64_t)f.queries], f.keys) : 0;
    }
  }

  GATE4D_DEVICE float weight(int r, float score) const { return fmaf(minus_score[r], score, 1.0f); }

  // s: logits to gated exponentials. `rescale` is for all that was summed before.
  GATE4D_DEVICE void weigh(float (&s)[64], const Forward& f, int n0, bool partial, uint32_t scores) {
    if (partial) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int r = i / 2 % 2, key = n0 + 8 * (i / 4) + column + i % 2;
        const bool seen = (key < sink[r]) | ((key >= start[r]) & (key < end[r]));  // not &&, which would branch
        s[i] = seen ? s[i] : -INFINITE;
      }
    }
    // A key of weight 0 must not raise the maximum; only a tile with a score of 1 can have one.
    if (GATE != NONE && load_pair(scores + BLOCK_N * 4).x >= 1.0f) {
#pragma unroll
      for (int i = 0; i < 64; i += 4) {
        const float2 b = load_pair(scores + (2 * i + column) * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i + e] = weight(e / 2, e % 2 ? b.y : b.x) > 0.0f ? s[i + e] : -INFINITE;
      }
    }
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = s[2 * r];
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (i / 2 % 2 == r) highest = fmaxf(highest, s[i]);
      highest = fmaxf(top[r], of_quad_max(highest) * f.exponent_scale);
      const float finite = highest == -INFINITE ? 0.0f : highest;
      rescale[r] = exp2_approx(top[r] - finite);
      top[r] = highest, offset[r] = SHIFT - finite;
      total[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
      float2 b{};
      if (GATE != NONE) b = load_pair(scores + (2 * i + column) * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        s[i + e] = exp2_approx(fmaf(s[i + e], f.exponent_scale, offset[r]));
        if (GATE != NONE) s[i + e] *= weight(r, e % 2 ? b.y : b.x);
        total[r] += s[i + e];
      }
    }
  }

  template <int D>
  GATE4D_DEVICE void store(const Forward& f, const Place& p, const float (&o)[D / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r;
      const float sum = of_quad_sum(total[r]);
      if (row >= f.queries) continue;
      const bool alive = sum > 0.0f;
      const float inverse = alive ? 1.0f / sum : 0.0f, lse = top[r] + (log2f(alive ? sum : 1.0f) - SHIFT);
      if (column == 0)
        f.lse[((int64_t)p.batch * f.heads + p.head) * f.queries + row] =
            alive ? lse * LN2_HIGH + lse * LN2_LOW : -INFINITE;
      T* out = (T*)f.out + p.batch * f.out_batch + p.head * f.out_head + row * f.out_token + column;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *(uint32_t*)(out + 8 * i) = pack(T(), o[4 * i + 2 * r] * inverse, o[4 * i + 2 * r + 1] * inverse);
    }
  }
};

// One thread: queries once, then tiles of keys and values as the ring has room. A stage is used for the n-th time in
// phase n; waiting for the phase before the first is no wait.
template <int D, int GATE>
GATE4D_DEVICE void produce(const Forward& f, const Place& p, const Span& span, uint32_t m) {
  using M = Memory<D>;
  if (span.count == 0) return;
  barrier_expect(M::q_full(m), M::TILE);
  for (int box = 0; box < D / BOX; ++box)
    copy_box(m + M::Q + box * BOX_BYTES, f.q, M::q_full(m), box * BOX, p.tile * BLOCK_M, p.head, p.batch);
  const int64_t tiles = (f.keys + BLOCK_N - 1) / BLOCK_N;
#pragma unroll 1
  for (int step = 0; step < span.count; ++step) {
    const int stage = step % M::STAGES, tile = span.tile(step);
    const uint32_t before = step / M::STAGES % 2 ^ 1;
    barrier_wait(M::k_empty(m, stage), before);
    barrier_expect(M::k_full(m, stage), M::TILE + (GATE != NONE ? SCORES * 4 : 0));
    for (int box = 0; box < D / BOX; ++box)
      copy_box(m + M::K + stage * M::TILE + box * BOX_BYTES, f.k, M::k_full(m, stage), box * BOX, tile * BLOCK_N,
               p.head, p.batch);
    if (GATE != NONE)
      copy_bytes(m + M::SCORE + stage * SCORES * 4, f.key_scores + (p.batch * tiles + tile) * SCORES, SCORES * 4,
                 M::k_full(m, stage));
    barrier_wait(M::v_empty(m, stage), before);
    barrier_expect(M::v_full(m, stage), M::TILE);
    for (int box = 0; box < D / BOX; ++box)
      copy_box(m + M::V + stage * M::TILE + box * BOX_BYTES, f.v, M::v_full(m, stage), box * BOX, tile * BLOCK_N,
               p.head, p.batch);
  }
}

GATE4D_DEVICE void release(uint32_t barrier, int thread) {
  warp_sync();
  if (thread % 32 == 0) barrier_arrive(barrier);
}

template <class T, int D, int GATE>
GATE4D_DEVICE void consume(const Forward& f, const Place& p, const Span& span, uint32_t m, int thread) {
  using M = Memory<D>;
  Rows<T, GATE> rows(f, p, thread);
  const uint32_t q = m + M::Q + (thread / 128 - 1) * 64 * 128;  // 64 rows of every box
  float s[64], o[D / 2];
  uint32_t probabilities[32];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

  const auto start_logits = [&](int step) {
    const int stage = step % M::STAGES;
    barrier_wait(M::k_full(m, stage), step / M::STAGES % 2);
    products_begin();
    logits<T, D>(s, q, m + M::K + stage * M::TILE);
    products_end();
  };
  const auto start_values = [&](int step) {
    const int stage = step % M::STAGES;
    barrier_wait(M::v_full(m, stage), step / M::STAGES % 2);
    products_begin();
    accumulate<T, D>(o, probabilities, m + M::V + stage * M::TILE);
    products_end();
  };
  const auto weigh = [&](int step) {
    const int stage = step % M::STAGES, n0 = span.tile(step) * BLOCK_N;
    rows.weigh(s, f, n0, span.partial(n0, f.keys), m + M::SCORE + stage * SCORES * 4);
    release(M::k_empty(m, stage), thread);
  };
  const auto round = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) probabilities[i] = pack(T(), s[2 * i], s[2 * i + 1]);
  };

  if (span.count > 0) {
    barrier_wait(M::q_full(m), 0);
    start_logits(0);
    products_wait<0>();
    pin(s);
    weigh(0);
    round();
#pragma unroll 1
    for (int step = 1; step < span.count; ++step) {
      start_logits(step);
      start_values(step - 1);
      products_wait<1>();
      pin(s);
      weigh(step);
      products_wait<0>();
      pin(o);
      release(M::v_empty(m, (step - 1) % M::STAGES), thread);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= rows.rescale[i / 2 % 2];
      round();
    }
    start_values(span.count - 1);
    products_wait<0>();
    pin(o);
  }
  rows.template store<D>(f, p, o);
}

// The work of one thread of a block; `m` is the address of its shared memory, a multiple of 1024.
template <class T, int D, int GATE>
GATE4D_DEVICE void forward_block(const Forward& f, const Place& p, int thread, uint32_t m) {
  using M = Memory<D>;
  if (thread == 0) {
    barrier_init(M::q_full(m), 1);
    for (int stage = 0; stage < M::STAGES; ++stage) {
      barrier_init(M::k_full(m, stage), 1), barrier_init(M::k_empty(m, stage), CONSUMER_WARPS);
      barrier_init(M::v_full(m, stage), 1), barrier_init(M::v_empty(m, stage), CONSUMER_WARPS);
    }
    barriers_made();
  }
  block_sync();
  if (thread < 128) {
    give_registers<24>();
    if (thread == 0) produce<D, GATE>(f, p, Span(f, p), m);
  } else {
    take_registers<240>();
    consume<T, D, GATE>(f, p, Span(f, p), m, thread);
  }
}

}  // namespace gate4d::hopper
