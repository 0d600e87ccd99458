// Blocks of csrc/cuda/hopper_forward.cuh on the CPU. Every thread is a fiber; what hopper_ptx.cuh makes of instructions
// is done here as the PTX manual describes it: phases of barriers, boxes swizzled by 128 bytes, descriptors, fragments.
// What is asynchronous happens, by `mode`, at once, as late as it may, or in a random order; memory that a copy will
// fill is NaN until then. A wait that nothing can end is reported.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define GATE4D_DEVICE inline

namespace gate4d::hopper {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;
using std::max;
using std::min;

enum Mode { AT_ONCE = 0, LATE = 1 };  // anything else is the seed of a random order

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[4], strides[3];  // features, tokens, heads, batch; of the last three in elements
};

struct Barrier {
  int arrivals, missing;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Product {  // of a warpgroup; complete once 128 threads have come
  int threads = 0, columns = 0;
  bool b_columns_first = false, add = false, done = false, half = false;
  std::array<float*, 128> d{};
  std::array<const uint32_t*, 128> a_registers{};
  uint64_t a = 0, b = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool finished = false;
  size_t products = 0;                // issued
  std::vector<size_t> groups;         // of each closed group, the products issued by then
  std::array<int, 3> meetings{};      // so far, of 4, 32 and all threads
};

struct Meeting {
  int come = 0;
  std::array<float, 4> values;  // of a quad
};

struct Block {
  int mode = 0;
  std::mt19937 random;
  std::vector<uint8_t> memory;
  std::map<uint32_t, Barrier> barriers;
  std::vector<std::function<void()>> copies;
  std::array<std::vector<Product>, 3> products;  // by warpgroup
  std::array<size_t, 3> wanted{};                // of them, awaited
  std::array<std::deque<Meeting>, 3 * 96> meetings;
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  int current = 0;
  int64_t progress = 0;
  std::function<void(int)> body;
};
Block* block;

inline Fiber& self() { return *block->fibers[block->current]; }
inline void yield() { swapcontext(&self().context, &block->scheduler); }

// All `size` threads around this one come before any goes on; each leaves a value.
inline const Meeting& meet(int size, float value = 0.0f) {
  const int thread = block->current, kind = size == 4 ? 0 : size == 32 ? 1 : 2;
  auto& all = block->meetings[kind * 96 + thread / size];
  const size_t number = self().meetings[kind]++;
  if (all.size() == number) all.emplace_back();
  Meeting& m = all[number];
  m.values[thread % 4] = value, ++m.come, ++block->progress;
  while (m.come < size) yield();
  return m;
}

inline void barrier_init(uint32_t at, uint32_t arrivals) { block->barriers[at] = {(int)arrivals, (int)arrivals}; }
inline void barriers_made() {}
inline void settle(Barrier& b) {
  ++block->progress;
  if (b.missing == 0 && b.bytes == 0) ++b.phase, b.missing = b.arrivals;
}
inline void barrier_arrive(uint32_t at) { --block->barriers.at(at).missing, settle(block->barriers.at(at)); }
inline void barrier_expect(uint32_t at, uint32_t bytes) {
  block->barriers.at(at).bytes += bytes;
  barrier_arrive(at);
}
inline void barrier_wait(uint32_t at, uint32_t parity) {
  while ((block->barriers.at(at).phase & 1) == parity) yield();
}
inline void block_sync() { meet((int)block->fibers.size()); }
inline void warp_sync() { meet(32); }
template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy(uint32_t to, uint32_t bytes, uint32_t barrier, std::function<void()> write) {
  std::memset(block->memory.data() + to, 0x7f, bytes);  // NaN in 16 bits; in 32 bits 3.4e38
  block->copies.push_back([=] {
    Barrier& b = block->barriers.at(barrier);
    write(), b.bytes -= bytes, settle(b);
  });
  if (block->mode == AT_ONCE) block->copies.back()(), block->copies.pop_back();
}

inline void copy_box(uint32_t to, const TensorMap& map, uint32_t barrier, int feature, int token, int head, int batch) {
  copy(to, 128 * 128, barrier, [=, &map] {
    for (int row = 0; row < 128; ++row)
      for (int i = 0; i < 64; ++i) {
        const bool inside = token + row < map.sizes[1] && feature + i < map.sizes[0];
        const uint16_t x = inside ? map.data[feature + i + (token + row) * map.strides[0] + head * map.strides[1] +
                                             batch * map.strides[2]]
                                  : 0;
        std::memcpy(&block->memory[swizzled(to + row * 128 + i * 2)], &x, 2);
      }
  });
}

inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || bytes % 16 || (uintptr_t)from % 16) std::abort();
  copy(to, bytes, barrier, [=] { std::memcpy(&block->memory[to], from, bytes); });
}

struct float2 {
  float x, y;
};
inline float2 load_pair(uint32_t from) {
  float2 x;
  std::memcpy(&x, &block->memory[from], 8);
  return x;
}

inline float number(uint16_t bits, bool half) {
  return half ? (float)fp16(bits, fp16::from_bits()) : (float)bf16(bits, bf16::from_bits());
}

// Element (row, feature) of a matrix of rows of features, or (feature, row) where its columns come first.
inline float element(uint64_t descriptor, bool columns_first, int row, int feature, bool half) {
  if (descriptor >> 62 != 1) std::abort();  // swizzled by 128 bytes
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t at =
      columns_first ? start + row / 64 * leading + feature / 8 * stride + feature % 8 * 128 + row % 64 * 2
                    : start + row / 8 * stride + row % 8 * 128 + feature * 2;
  uint16_t bits;
  std::memcpy(&bits, &block->memory[swizzled(at)], 2);
  return number(bits, half);
}

inline void multiply(Product& p) {
  std::vector<float> a(64 * 16), b(p.columns * 16);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 8; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i / 4 * 8 + i % 2;
      a[row * 16 + k] = p.a_registers[t] ? number((uint16_t)(p.a_registers[t][i / 2] >> 16 * (i % 2)), p.half)
                                         : element(p.a, false, row, k, p.half);
    }
  for (int n = 0; n < p.columns; ++n)
    for (int k = 0; k < 16; ++k) b[n * 16 + k] = element(p.b, p.b_columns_first, n, k, p.half);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[n * 16 + k];
      p.d[t][i] = p.add ? p.d[t][i] + sum : sum;
    }
  p.done = true, ++block->progress;
}

// In order, up to `end`.
inline void run_products(std::vector<Product>& all, size_t end) {
  for (size_t i = 0; i < end && all[i].threads == 128; ++i)
    if (!all[i].done) multiply(all[i]);
}

inline void issue(float* d, int columns, const uint32_t* registers, uint64_t a, uint64_t b, bool add, bool half) {
  auto& all = block->products[block->current / 128];
  if (all.size() == self().products) all.emplace_back();
  Product& p = all[self().products++];
  if (p.threads > 0 && (p.a != a || p.b != b || p.add != add)) std::abort();  // one instruction of a warpgroup
  p.columns = columns, p.a = a, p.b = b, p.add = add, p.half = half, p.b_columns_first = registers != nullptr;
  p.d[block->current % 128] = d, p.a_registers[block->current % 128] = registers, ++p.threads, ++block->progress;
  if (block->mode == AT_ONCE) run_products(all, all.size());
}

inline void products_begin() {}
inline void products_end() { self().groups.push_back(self().products); }
template <int Pending>
void products_wait() {
  Fiber& f = self();
  if (f.groups.size() <= Pending) return;
  auto& all = block->products[block->current / 128];
  const size_t end = f.groups[f.groups.size() - 1 - Pending];
  size_t& wanted = block->wanted[block->current / 128];
  wanted = max(wanted, end);
  while (!all[end - 1].done) yield();
}
template <int N>
void pin(float (&)[N]) {}

template <class T>
void product(T, float (&d)[64], uint64_t a, uint64_t b, int add) {
  issue(d, 128, nullptr, a, b, add != 0, std::is_same<T, fp16>::value);
}
template <class T, int N>
void product(T, float (&d)[N], const uint32_t* a, uint64_t b) {
  issue(d, 2 * N, a, 0, b, true, std::is_same<T, fp16>::value);
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float quad(float x, bool sum) {
  const Meeting& m = meet(4, x);
  const float a = sum ? m.values[0] + m.values[1] : max(m.values[0], m.values[1]);
  const float b = sum ? m.values[2] + m.values[3] : max(m.values[2], m.values[3]);
  return sum ? a + b : max(a, b);
}
inline float of_quad_max(float x) { return quad(x, false); }
inline float of_quad_sum(float x) { return quad(x, true); }
template <class T>
uint32_t pack(T, float low, float high) {
  return (uint32_t)T(high).x << 16 | T(low).x;
}

}  // namespace gate4d::hopper

#include "../csrc/cuda/hopper_forward.cuh"

using namespace gate4d::hopper;

static void enter() {
  block->body(block->current);
  self().finished = true, ++block->progress;
  swapcontext(&self().context, &block->scheduler);
}

// One of the things in flight: products that are awaited before copies, or any.
static bool happen(Block& b) {
  std::vector<int> groups;
  for (int g = 0; g < 3; ++g) {
    const auto& all = b.products[g];
    const auto next = std::find_if(all.begin(), all.end(), [](const Product& p) { return !p.done; });
    if (next - all.begin() < (ptrdiff_t)b.wanted[g] && next->threads == 128) groups.push_back(g);
  }
  const size_t all = groups.size() + b.copies.size();
  if (all == 0) return false;
  const size_t i = b.mode > LATE ? b.random() % all : 0;
  if (i < groups.size()) {
    run_products(b.products[groups[i]], b.wanted[groups[i]]);
  } else {
    const auto write = b.copies[i - groups.size()];
    b.copies.erase(b.copies.begin() + (i - groups.size()));
    write();
  }
  return true;
}

// Whether all threads came to their end, with nothing left in flight.
static bool run(int mode, std::function<void(int, uint32_t)> body) {
  Block b;
  block = &b;
  b.mode = mode, b.random.seed(mode), b.memory.assign(256 << 10, 0x7f);
  const uint32_t base = 3 * 1024;
  b.body = [&](int thread) { body(thread, base); };
  for (int t = 0; t < THREADS; ++t) {
    b.fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *b.fibers.back();
    f.stack.resize(32 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  std::vector<int> order(THREADS);
  for (int t = 0; t < THREADS; ++t) order[t] = t;
  for (;;) {
    const int64_t before = b.progress;
    if (mode > LATE) std::shuffle(order.begin(), order.end(), b.random);
    bool all = true;
    for (int t : order) {
      if (b.fibers[t]->finished) continue;
      all = false, b.current = t;
      swapcontext(&b.scheduler, &b.fibers[t]->context);
    }
    if (all) return b.copies.empty();
    const bool stuck = b.progress == before;
    if ((stuck || (mode > LATE && b.random() % 3 == 0)) && !happen(b) && stuck) return false;
  }
}

template <class T, int D>
static bool run_all(const Forward& f, int batch, int mode) {
  for (int b = 0; b < batch; ++b)
    for (int head = 0; head < f.heads; ++head)
      for (int tile = 0; tile * BLOCK_M < f.queries; ++tile) {
        const Place p{tile, head, b};
        const bool ok = run(mode, [&](int thread, uint32_t m) {
          if (f.key_scores == nullptr) return forward_block<T, D, NONE>(f, p, thread, m);
          if (f.query_score == nullptr) return forward_block<T, D, KEYS>(f, p, thread, m);
          forward_block<T, D, PAIRS>(f, p, thread, m);
        });
        if (!ok) return false;
      }
  return true;
}

// As gate4d_hopper_forward of csrc/cuda/hopper_forward.cu, with `mode` in the place of the stream.
extern "C" int gate4d_hopper_forward(int half, const int64_t* sizes, const int64_t* strides, const void* q,
                                     const void* k, const void* v, const float* query_score, const float* key_scores,
                                     const int* bounds, const int* reach, void* out, float* lse, float exponent_scale,
                                     void* mode) {
  Forward f{};
  const void* data[3] = {q, k, v};
  TensorMap* maps[3] = {&f.q, &f.k, &f.v};
  for (int i = 0; i < 3; ++i)
    *maps[i] = {(const uint16_t*)data[i], {sizes[4], sizes[i == 0 ? 2 : 3], sizes[1], sizes[0]},
                {strides[3 * i + 2], strides[3 * i + 1], strides[3 * i]}};
  f.query_score = query_score, f.key_scores = key_scores, f.bounds = bounds, f.reach = reach, f.out = out, f.lse = lse;
  f.out_batch = strides[9], f.out_head = strides[10], f.out_token = strides[11];
  f.bounds_batch = strides[12], f.reach_batch = strides[13];
  f.heads = (int)sizes[1], f.queries = (int)sizes[2], f.keys = (int)sizes[3], f.exponent_scale = exponent_scale;
  const int batch = (int)sizes[0], how = (int)(intptr_t)mode;
  const bool wide = sizes[4] == 128;
  const bool ok = half ? (wide ? run_all<fp16, 128>(f, batch, how) : run_all<fp16, 64>(f, batch, how))
                       : (wide ? run_all<bf16, 128>(f, batch, how) : run_all<bf16, 64>(f, batch, how));
  return ok ? 0 : 1;
}
