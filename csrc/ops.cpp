// Registrations through torch's stable ABI. Schemas, fake kernels and autograd are in kernels/<operation>/op.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gate_input.h"
#include "cpu/kernels.h"
#include "operands.h"

namespace {

using gate4d::ANY;
using gate4d::data_or_null;
using gate4d::dense;
using gate4d::DType;
using gate4d::expect;
using gate4d::GateTensors;
using gate4d::Optional;
using gate4d::Sizes;
using gate4d::Tensor;

// One growing buffer a thread, kept between calls: small calls would spend more time in the allocator.
class ThreadScratch {
 public:
  ~ThreadScratch() { std::free(data_); }
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// ThreadSanitizer does not see how torch's threads, which are not built with it, start and finish: it is told.
#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
char handover;
inline void take_over() { __tsan_acquire(&handover); }
inline void hand_over() { __tsan_release(&handover); }
#else
inline void take_over() {}
inline void hand_over() {}
#endif

// Runs tasks on torch's threads; each takes the next one, because tasks differ in length.
template <class F>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const F& task) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    take_over();
    thread_local ThreadScratch buffer;
    void* scratch = buffer.at_least(scratch_bytes);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, scratch);
    hand_over();
  };
  hand_over();
  torch::stable::parallel_for(0, workers, 1, work);
  take_over();
}

// Kernels read any strides but a last one other than 1.
Tensor with_unit_stride(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

gate4d::Heads heads_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// On the CPU. Not through the dispatcher, which takes as long as a small call's arithmetic.
template <size_t N>
Tensor empty(const int64_t (&shape)[N], const int64_t (&strides)[N], int32_t dtype) {
  AtenTensorHandle made;
  const auto failed = aoti_torch_empty_strided(N, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &made);
  STD_TORCH_CHECK(!failed, "gate4d: can't allocate memory for a result");
  return Tensor(made);
}

// [B, H, N, D] over [B, N, H, D] memory, as the fake kernels promise.
Tensor empty_heads_last(int32_t dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim) {
  const int64_t d = std::max<int64_t>(dim, 1), h = std::max<int64_t>(heads, 1) * d;
  return empty({batch, heads, tokens, dim}, {std::max<int64_t>(tokens, 1) * h, d, h, 1}, dtype);
}

template <size_t N>
Tensor new_floats(const int64_t (&shape)[N]) {
  int64_t strides[N];
  strides[N - 1] = 1;
  for (size_t i = N - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return empty(shape, strides, aoti_torch_dtype_float32());
}

// Work is cut for this many threads whatever their number is, so that results are the same with any.
constexpr int64_t THREADS = 16;

// Enough panels to read keys seldom, few enough to stay in a core's cache and to keep every thread busy.
int panels_per_task(int64_t heads, int64_t queries, int64_t floats_per_query, int panel) {
  const int64_t panels = (queries + panel - 1) / panel;
  const int64_t by_cache = std::max<int64_t>(1, 256 * 1024 / (4 * std::max<int64_t>(1, floats_per_query) * panel));
  const int64_t by_threads = std::max<int64_t>(1, heads * panels / (3 * THREADS));
  return (int)std::min({by_cache, by_threads, panels, (int64_t)8});
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, Optional query_score,
                                                     Optional key_score, Optional dropped_keys, Optional bounds,
                                                     double scale, double strength, bool renormalize, bool row_stats) {
  const Sizes n(q, k);
  const auto [batch, heads, queries, keys, dim, code, dtype] = n;
  const int64_t value_dim = n.expect_values(v);
  gate4d::expect_finite("scale", scale);
  const GateTensors tensors(n, query_score, key_score, dropped_keys, bounds, strength);
  q = with_unit_stride(q), k = with_unit_stride(k), v = with_unit_stride(v);
  const Tensor out = empty_heads_last(code, batch, heads, queries, value_dim);
  const Tensor lse = new_floats({batch, heads, queries});
  const Tensor stats = row_stats ? new_floats({3, batch, heads, queries}) : new_floats({0});
  if (batch * heads * queries == 0) return {out, lse, stats};
  const gate4d::PreparedGate prepared(tensors.input(n, strength, renormalize, row_stats));
  const gate4d::Kernels& kernels = gate4d::kernels();

  gate4d::AttentionForward f{};
  f.q = heads_of(q), f.k = heads_of(k), f.v = heads_of(v), f.out = heads_of(out);
  f.lse = (float*)lse.data_ptr();
  f.stats = row_stats ? (float*)stats.data_ptr() : nullptr;
  f.batch = (int)batch, f.heads = (int)heads, f.queries = (int)queries, f.keys = (int)keys;
  f.head_dim = (int)dim, f.value_dim = (int)value_dim;
  f.dtype = dtype;
  f.scale = (float)scale;
  f.gate = prepared.gate;
  f.panels = panels_per_task(batch * heads, queries, f.head_dim + f.value_dim, kernels.panel);
  const int64_t block = (int64_t)f.panels * kernels.panel;
  run_tasks(batch * heads * ((queries + block - 1) / block), kernels.forward_scratch(f),
            [&](int64_t task, void* scratch) { kernels.forward(f, task, scratch); });
  return {out, lse, stats};
}

// Sums over the parts of [parts, outer, heads, inner] into [outer, inner]: heads share one gate.
void sum_heads(const float* from, int64_t parts, int64_t outer, int64_t heads, int64_t inner, float* to) {
  std::fill(to, to + outer * inner, 0.0f);
  for (int64_t i = 0; i < parts * outer * heads; ++i) {
    float* row = to + i / heads % outer * inner;
    for (int64_t j = 0; j < inner; ++j) row[j] += from[i * inner + j];
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(Tensor grad_out, Optional grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                             Optional query_score, Optional key_score, Optional dropped_keys, Optional bounds,
                             double scale, double strength, bool renormalize, bool score_grads) {
  const Sizes n(q, k);
  const auto [batch, heads, queries, keys, dim, code, dtype] = n;
  const int64_t value_dim = n.expect_values(v);
  const int32_t fp32 = aoti_torch_dtype_float32();
  expect(grad_out, "grad_out", code, {batch, heads, queries, value_dim});
  expect(out, "out", code, {batch, heads, queries, value_dim});
  expect(lse, "lse", fp32, {batch, heads, queries});
  if (grad_lse) expect(*grad_lse, "grad_lse", fp32, {batch, heads, queries});
  gate4d::expect_finite("scale", scale);
  const GateTensors tensors(n, query_score, key_score, dropped_keys, bounds, strength);
  q = with_unit_stride(q), k = with_unit_stride(k), v = with_unit_stride(v);
  grad_out = with_unit_stride(grad_out), out = with_unit_stride(out), lse = torch::stable::contiguous(lse);
  Tensor grad_q = empty_heads_last(code, batch, heads, queries, dim);
  Tensor grad_k = empty_heads_last(code, batch, heads, keys, dim);
  Tensor grad_v = empty_heads_last(code, batch, heads, keys, value_dim);
  for (Tensor* x : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*x);
  const auto score_like = [&](const Optional& score) {
    if (!score_grads || !score) return new_floats({0});
    Tensor grad = new_floats({score->size(0), score->size(1)});
    torch::stable::zero_(grad);
    return grad;
  };
  const Tensor grad_query_score = score_like(query_score), grad_key_score = score_like(key_score);
  if (batch * heads * queries * keys == 0) return {grad_q, grad_k, grad_v, grad_query_score, grad_key_score};

  const gate4d::PreparedGate prepared(tensors.input(n, strength, renormalize, false));
  const gate4d::Gate& g = prepared.gate;
  const gate4d::Kernels& kernels = gate4d::kernels();
  gate4d::AttentionBackward f{};
  f.q = heads_of(q), f.k = heads_of(k), f.v = heads_of(v), f.out = heads_of(out), f.grad_out = heads_of(grad_out);
  f.grad_q = heads_of(grad_q), f.grad_k = heads_of(grad_k), f.grad_v = heads_of(grad_v);
  const Optional dense_grad_lse = dense(grad_lse);
  f.lse = (const float*)lse.data_ptr();
  f.grad_lse = data_or_null<float>(dense_grad_lse);
  f.batch = (int)batch, f.heads = (int)heads, f.queries = (int)queries, f.keys = (int)keys;
  f.head_dim = (int)dim, f.value_dim = (int)value_dim;
  f.dtype = dtype;
  f.scale = (float)scale;
  f.gate = g;
  f.panels = panels_per_task(batch * heads * queries, queries, 3 * f.head_dim + 2 * f.value_dim, kernels.panel);
  // Every chunk sums a gradient of all queries of its own: no more of them than 16 MiB hold.
  const int64_t part_bytes = std::max<int64_t>(1, 4 * batch * heads * queries * f.head_dim);
  f.chunks = (int)std::max<int64_t>(1, std::min({THREADS / (batch * heads), keys / 128, (16 << 20) / part_bytes}));

  std::vector<float> q_parts, query_parts, key_parts;
  if (f.chunks > 1) {
    q_parts.resize(f.chunks * batch * heads * queries * f.head_dim);
    f.grad_q_parts = q_parts.data();
  }
  const bool scores = score_grads && g.key_score != nullptr;
  if (scores) {
    key_parts.resize(batch * heads * keys);
    f.grad_key_weight = key_parts.data();
    if (g.query_score != nullptr) {
      query_parts.resize(f.chunks * batch * heads * queries);
      f.grad_query_score = query_parts.data();
    }
  }
  run_tasks(batch * heads * f.chunks, kernels.backward_scratch(f),
            [&](int64_t task, void* scratch) { kernels.backward(f, task, scratch); });

  if (f.chunks > 1) kernels.sum_parts(f);
  if (scores) {
    float* grad = (float*)grad_key_score.data_ptr();
    sum_heads(key_parts.data(), 1, batch, heads, keys, grad);
    if (g.query_score != nullptr) {
      sum_heads(query_parts.data(), f.chunks, batch, heads, queries, (float*)grad_query_score.data_ptr());
    } else {
      prepared.key_weight_to_score(grad);
    }
  }
  return {grad_q, grad_k, grad_v, grad_query_score, grad_key_score};
}

// Dropped keys are the caller's: once lse is known they concern nothing but their own entries.
std::tuple<Tensor, Tensor> received_attention(Tensor q, Tensor k, Tensor lse, Optional query_score, Optional key_score,
                                              Optional bounds, double scale, double strength) {
  const Sizes n(q, k);
  const auto [batch, heads, queries, keys, dim, code, dtype] = n;
  expect(lse, "lse", aoti_torch_dtype_float32(), {batch, heads, queries});
  gate4d::expect_finite("scale", scale);
  const GateTensors tensors(n, query_score, key_score, Optional(), bounds, strength);
  q = with_unit_stride(q), k = with_unit_stride(k), lse = torch::stable::contiguous(lse);
  const Tensor mean = new_floats({batch, heads, keys}), m2 = new_floats({batch, heads, keys});
  if (batch * heads * keys == 0) return {mean, m2};
  if (queries == 0) gate4d::fail("q must have at least one query, got none.");
  const gate4d::PreparedGate prepared(tensors.input(n, strength, true, false));
  const gate4d::Kernels& kernels = gate4d::kernels();

  gate4d::ReceivedAttention f{};
  f.q = heads_of(q), f.k = heads_of(k);
  f.lse = (const float*)lse.data_ptr();
  f.mean = (float*)mean.data_ptr(), f.m2 = (float*)m2.data_ptr();
  f.batch = (int)batch, f.heads = (int)heads, f.queries = (int)queries, f.keys = (int)keys;
  f.head_dim = (int)dim;
  f.dtype = dtype;
  f.scale = (float)scale;
  f.gate = prepared.gate;
  f.panels = panels_per_task(batch * heads, keys, f.head_dim, kernels.panel);
  const int64_t block = (int64_t)f.panels * kernels.panel;
  run_tasks(batch * heads * ((keys + block - 1) / block), kernels.received_scratch(f),
            [&](int64_t task, void* scratch) { kernels.received(f, task, scratch); });
  return {mean, m2};
}

// Moments over the rows of y of the products with the rows of x, whose features are those of its parts in order;
// see gate4d/statistics/cross.py.
std::tuple<Tensor, Tensor> cross_moments(std::vector<Tensor> x, Tensor y, Tensor centre) {
  if (x.empty()) gate4d::fail("x must have at least one part, got none.");
  const int32_t fp32 = aoti_torch_dtype_float32();
  const int64_t* const first = expect(x[0], "x[0]", fp32, {ANY, ANY, ANY, ANY});
  const int64_t batch = first[0], rows = first[2];
  std::vector<gate4d::Features> parts;
  int64_t features = 0;
  for (Tensor& part : x) {
    const int64_t* const n = expect(part, "each part of x", fp32, {batch, ANY, rows, ANY});
    const int64_t heads = n[1], dim = n[3];
    for (int64_t size : {heads, dim, heads * dim, features += heads * dim})
      gate4d::expect_size("the number of features of x", size, gate4d::MAX_FEATURES);
    part = with_unit_stride(part);
    parts.push_back({heads_of(part), (int)heads, (int)dim});
  }
  const int64_t columns = expect(y, "y", fp32, {batch, ANY, features})[1];
  expect(centre, "centre", fp32, {batch, features});
  for (int64_t size : {batch, rows, columns}) gate4d::expect_size("each of B, Nx and Ny", size, gate4d::MAX_SIZE);
  if (columns == 0) gate4d::fail("y must have at least one row, got none.");
  y = with_unit_stride(y), centre = torch::stable::contiguous(centre);
  const Tensor mean = new_floats({batch, rows}), m2 = new_floats({batch, rows});
  if (batch * rows == 0) return {mean, m2};
  const gate4d::Kernels& kernels = gate4d::kernels();

  gate4d::CrossMoments f{};
  f.x = parts.data(), f.parts = (int)parts.size();
  f.y = (const float*)y.data_ptr(), f.centre = (const float*)centre.data_ptr();
  f.y_batch = y.stride(0), f.y_row = y.stride(1);
  f.mean = (float*)mean.data_ptr(), f.m2 = (float*)m2.data_ptr();
  f.batch = (int)batch, f.rows = (int)rows, f.columns = (int)columns, f.features = (int)features;
  // A row is one lane whatever the blocks are: they may follow the number of threads, and pack y as seldom as it
  // allows.
  const int64_t panels = (rows + kernels.panel - 1) / kernels.panel;
  const int64_t by_threads = batch * panels / (2 * torch::stable::get_num_threads());
  const int64_t by_memory = (2 << 20) / (4 * kernels.panel * std::max<int64_t>(features, 1));
  f.panels = (int)std::max<int64_t>(1, std::min({by_threads, by_memory, panels, (int64_t)8}));
  const int64_t block = (int64_t)f.panels * kernels.panel;
  run_tasks(batch * ((rows + block - 1) / block), kernels.cross_scratch(f),
            [&](int64_t task, void* scratch) { kernels.cross(f, task, scratch); });
  return {mean, m2};
}

std::string cpu_isa() { return gate4d::kernels().name; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gate4d, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(gate4d, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

STABLE_TORCH_LIBRARY_IMPL(gate4d, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("received_attention", TORCH_BOX(&received_attention));
  m.impl("cross_moments", TORCH_BOX(&cross_moments));
}
