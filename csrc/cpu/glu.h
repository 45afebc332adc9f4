// Gated linear unit: y = act(gate) * up, or act(gate) where up is null. Body of glu.cpp, compiled per
// instruction set.
//
//   forward    reads gate, up; writes y
//   backward   reads dy, gate, up; writes dgate = dy * up * act'(gate), dup = dy * act(gate); the
//              activation is recomputed
//
// Work is cut into pieces of PIECE elements of a row; contiguous tensors are one row.
#include "cpu/base/parallel.h"

constexpr int64_t PIECE = 4096;  // elements: 8 to 16 KiB per operand; hides the cost of the loop

enum class Act { silu, gelu_tanh, gelu, relu2 };

inline Act act_of(const std::string& name) {
  if (name == "silu") return Act::silu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  if (name == "gelu") return Act::gelu;
  if (name == "relu2") return Act::relu2;
  throw std::invalid_argument("act: expected silu, gelu_tanh, gelu or relu2, got '" + name + "'");
}

struct ActAndSlope {
  vfloat value, slope;
};

struct Sigmoid {
  vfloat s, rest;  // sigmoid of x and of -x, both to the last bit: 1 - s would cancel
};
FASTLM_INLINE Sigmoid both_sigmoids(vfloat x) {
  const vfloat e = vexp(-vabs(x)), r = 1.f / (1.f + e), er = e * r;
  const vint negative = x < splat(0.f);
  return {negative ? er : r, negative ? r : er};
}

template <Act A, class T>
FASTLM_INLINE ActAndSlope activate(vfloat x) {
  if constexpr (A == Act::silu) {
    const Sigmoid g = both_sigmoids(x);
    return {x * g.s, g.s * (1.f + x * g.rest)};
  } else if constexpr (A == Act::relu2) {
    const vfloat positive = x < splat(0.f) ? splat(0.f) : x;  // NaN stays
    return {positive * positive, 2.f * positive};
  } else if constexpr (A == Act::gelu) {
    const vfloat z = x * 0.70710678118654752f;
    const vfloat cdf = .5f + .5f * (sizeof(T) == 2 ? verf_coarse(z) : verf(z));
    return {x * cdf, cdf + x * vexp(-.5f * x * x) * 0.39894228040143268f};
  } else {
    // .5 (1 + tanh z) is sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3); beyond 1e4, where
    // sigmoid is 0 or 1, x^3 must not overflow to 0 * inf
    const vfloat c = vmax(splat(-1e4f), vmin(splat(1e4f), x)), c2 = c * c;
    const Sigmoid g = both_sigmoids(c * (1.5957691216057308f + 0.071354816272600248f * c2));
    const vfloat inner = c * (1.5957691216057308f + 0.21406444881780074f * c2);
    return {x * g.s, g.s * (1.f + g.rest * inner)};
  }
}
template <Act A, class T>
FASTLM_INLINE vfloat value_of(vfloat x) {
  if constexpr (A == Act::silu) return x / (1.f + vexp(-x));
  return activate<A, T>(x).value;
}

template <Act A, class T>
void glu_piece(const T* gate, const T* up, int64_t n, T* y) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) store(y + j, value_of<A, T>(load(gate + j)) * load(up + j));
  if (const int k = int(n - j))
    store(y + j, value_of<A, T>(load(gate + j, k)) * load(up + j, k), k);
}
template <Act A, class T>
void act_piece(const T* gate, int64_t n, T* y) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) store(y + j, value_of<A, T>(load(gate + j)));
  if (const int k = int(n - j)) store(y + j, value_of<A, T>(load(gate + j, k)), k);
}

template <Act A, class T>
void glu_backward_piece(const T* dy, const T* gate, const T* up, int64_t n, T* dgate, T* dup) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) {
    const vfloat g = load(dy + j);
    const ActAndSlope a = activate<A, T>(load(gate + j));
    store(dgate + j, g * load(up + j) * a.slope);
    store(dup + j, g * a.value);
  }
  if (const int k = int(n - j)) {
    const vfloat g = load(dy + j, k);
    const ActAndSlope a = activate<A, T>(load(gate + j, k));
    store(dgate + j, g * load(up + j, k) * a.slope, k);
    store(dup + j, g * a.value, k);
  }
}
template <Act A, class T>
void act_backward_piece(const T* dy, const T* gate, int64_t n, T* dgate) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL)
    store(dgate + j, load(dy + j) * activate<A, T>(load(gate + j)).slope);
  if (const int k = int(n - j))
    store(dgate + j, load(dy + j, k) * activate<A, T>(load(gate + j, k)).slope, k);
}

// Calls f(row, first column, columns) for every piece, in parallel.
template <class F>
void for_each_piece(int64_t rows, int64_t columns, F f) {
  const int64_t pieces = (columns + PIECE - 1) / PIECE;
  // below 32768 elements a parallel region costs more than it saves
  parallel_for(rows * pieces, rows * columns > 32768, [=](int64_t t) {
    const int64_t i = t / pieces, j = t % pieces * PIECE;
    f(i, j, std::min(PIECE, columns - j));
  });
}

template <class F>
void with_act(const std::string& name, F&& f) {
  switch (act_of(name)) {
    case Act::silu:
      return f(std::integral_constant<Act, Act::silu>{});
    case Act::gelu_tanh:
      return f(std::integral_constant<Act, Act::gelu_tanh>{});
    case Act::gelu:
      return f(std::integral_constant<Act, Act::gelu>{});
    case Act::relu2:
      return f(std::integral_constant<Act, Act::relu2>{});
  }
}

struct Matrix {
  int64_t rows, columns;
};
// Contiguous tensors of any shape are one row; others are matrices with a row stride. A null tensor
// is ignored.
inline Matrix matrix_of(std::initializer_list<const TensorView*> tensors) {
  const TensorView& first = **tensors.begin();
  bool contiguous = true;
  for (const TensorView* t : tensors) contiguous = contiguous && (!t || t->contiguous());
  if (contiguous) return {1, first.numel()};
  for (const TensorView* t : tensors)
    if (t) check_size("glu", "dimensions:", 2, t->ndim());
  return {first.size(0), first.size(1)};
}
inline int64_t row_stride(const Matrix& m, const TensorView* t) {
  return t && m.rows > 1 ? t->stride(0) : 0;
}

// gate, up (may be null): contiguous, or (N, F) with contiguous rows of any stride; y contiguous
inline void glu_forward(const TensorView& gate, const TensorView* up, const std::string& act,
                        const TensorView& y) {
  prefer_huge_pages(y);
  with_float(gate.dtype(), "gate", [&](auto tag) {
    using T = decltype(tag);
    const T *pg = gate.data<T>("gate"), *pu = up ? up->data<T>("up") : nullptr;
    T* py = y.data<T>("y");
    const Matrix m = matrix_of({&gate, up});
    const int64_t n = m.columns, s_g = row_stride(m, &gate), s_u = row_stride(m, up);
    with_act(act, [&](auto a) {
      for_each_piece(m.rows, n, [=](int64_t i, int64_t j, int64_t k) {
        if (pu)
          glu_piece<a.value>(pg + i * s_g + j, pu + i * s_u + j, k, py + i * n + j);
        else
          act_piece<a.value>(pg + i * s_g + j, k, py + i * n + j);
      });
    });
  });
}

// dy, gate, up: as above; dgate, dup (null as up) contiguous
inline void glu_backward(const TensorView& dy, const TensorView& gate, const TensorView* up,
                         const std::string& act, const TensorView& dgate, const TensorView* dup) {
  prefer_huge_pages(dgate);
  if (dup) prefer_huge_pages(*dup);
  with_float(gate.dtype(), "gate", [&](auto tag) {
    using T = decltype(tag);
    const T *pdy = dy.data<T>("dy"), *pg = gate.data<T>("gate"),
            *pu = up ? up->data<T>("up") : nullptr;
    T *pdg = dgate.data<T>("dgate"), *pdu = dup ? dup->data<T>("dup") : nullptr;
    const Matrix m = matrix_of({&dy, &gate, up});
    const int64_t n = m.columns, s_d = row_stride(m, &dy), s_g = row_stride(m, &gate),
                  s_u = row_stride(m, up);
    with_act(act, [&](auto a) {
      for_each_piece(m.rows, n, [=](int64_t i, int64_t j, int64_t k) {
        const T *d = pdy + i * s_d + j, *g = pg + i * s_g + j;
        if (pu)
          glu_backward_piece<a.value>(d, g, pu + i * s_u + j, k, pdg + i * n + j, pdu + i * n + j);
        else
          act_backward_piece<a.value>(d, g, k, pdg + i * n + j);
      });
    });
  });
}
