// What an operator demands of its arguments before a kernel reads them. Exported and compiled graphs, and direct calls,
// come here without Python's checks: rank, sizes, dtype, device and values are checked once more, for some nanoseconds.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace gate4d {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t ANY = -1;                          // a size that is the caller's choice
constexpr int64_t MAX_SIZE = INT32_MAX - (1 << 16);  // kernels count tokens in 32 bits, and tiles past the last one
constexpr int64_t MAX_DIM = 1 << 16;                 // of a head: tiles of it must fit in memory
constexpr int64_t MAX_FEATURES = 1 << 22;            // of a row of all heads together, likewise

template <class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "gate4d: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  return "another dtype";
}

inline std::string shape_text(const int64_t* sizes, int64_t rank) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < rank; ++i) {
    if (i) text << ", ";
    if (sizes[i] == ANY) text << "any";
    else text << sizes[i];
  }
  text << ']';
  return text.str();
}

inline int32_t dtype_code(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

[[noreturn]] __attribute__((cold, noinline)) inline void misfit(const Tensor& x, const char* name, int32_t dtype,
                                                                const int64_t* sizes, int64_t rank) {
  int64_t* got;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &got));
  fail(name, " must be ", dtype_name(dtype), ' ', shape_text(sizes, rank), " on the CPU, got ",
       dtype_name(dtype_code(x)), ' ', shape_text(got, x.dim()), x.is_cpu() ? "" : " on another device", '.');
}

// The sizes of x, which are those wanted.
template <size_t RANK>
const int64_t* expect(const Tensor& x, const char* name, int32_t dtype, const int64_t (&wanted)[RANK]) {
  int64_t* sizes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &sizes));
  if (x.dim() != (int64_t)RANK || dtype_code(x) != dtype || !x.is_cpu()) misfit(x, name, dtype, wanted, RANK);
  bool fits = true, elements = true;
  for (size_t i = 0; i < RANK; ++i) {
    fits &= wanted[i] == ANY || sizes[i] == wanted[i];
    elements &= sizes[i] != 0;
  }
  if (!fits) misfit(x, name, dtype, wanted, RANK);
  if (elements && x.data_ptr() == nullptr) fail(name, " has no memory.");
  return sizes;
}

inline void expect_size(const char* what, int64_t size, int64_t largest) {
  if (size > largest) fail(what, " must be at most ", largest, ", got ", size, '.');
}

inline void expect_finite(const char* name, double x) {
  if (!(std::fabs(x) <= std::numeric_limits<float>::max())) fail(name, " must be finite in float32, got ", x, '.');
}

inline void expect_strength(double strength) {
  expect_finite("strength", strength);
  if (strength < 0) fail("strength must be >= 0, got ", strength, '.');
}

// Loops without a way out, so that compilers make vectors of them.

inline void expect_scores(const char* name, const float* score, int64_t n) {
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= score[i] >= 0 && score[i] <= 1;
  if (!inside) fail(name, " must hold values in [0, 1], got one outside or NaN.");
}

// Starts may lie past the end: such an interval is empty.
inline void expect_bounds(const int32_t* bounds, int64_t batch, int64_t queries, int64_t num_keys) {
  const int32_t keys = (int32_t)num_keys;
  int32_t outside = 0;
  for (int64_t b = 0; b < batch; ++b, bounds += 3 * queries) {
    for (int64_t i = 0; i < queries; ++i) outside |= bounds[i] < 0;
    for (int64_t i = queries; i < 3 * queries; ++i) outside |= (bounds[i] < 0) | (bounds[i] > keys);
  }
  if (outside) fail("bounds must hold starts >= 0, and ends and sink ends in [0, ", keys, "] (Nk), got one outside.");
}

}  // namespace gate4d
