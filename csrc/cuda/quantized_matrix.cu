// y = x W^T + bias by matrix instructions, W in int8 or int4: bfloat16 and float16 x of up to 64
// rows a block, int8 x (quantized_round.cu) of any number.
//
//     W is the left operand: y^T (16 x 8) += W (16 x 16) x^T (16 x 8), so few rows of x waste
//     little.
//
//     block (m, n, part), 8 warps, a tile of K at a time:              k ->
//       codes      n [ warps_n x 16 TILES rows ][ warps_k x RANGE ]    read once per block of m
//       x          m [ 8 NT rows ][ warps_k x RANGE columns ]          read once per block of n
//       warp       16 TILES rows of W, all of x's, RANGE columns in steps of 32
//
// Both come by cp.async, STAGES tiles deep, as they lie in memory. No other layout of the codes is
// needed: an instruction's k may be any columns as long as both operands agree, and with lane c of
// a row's four holding the octet 8 c of a step, codes are one 32-bit (int4) or 64-bit (int8) read
// and x one of 128 bits (int8: 64). Rows in shared memory are padded so that these meet no bank
// twice. A repacked weight would save the pad and 6 reads of codes in 8, 6 instructions of 150 in a
// warp's 128 columns, and cost a second copy of every checkpoint.
//
// EXACT: symmetric, groups of a multiple of 32. The instructions multiply q, which 16 bits hold;
// the scale goes onto the sums of a group, in float32. Otherwise w = scale q + zero is made in
// float32 and rounded to x's dtype, as dequantize does.
//
// Where blocks are few, K is cut into parts: sums in float32, added in order by add_parts. A
// counter with "the last block adds" would save that kernel's start, but must be zero before and
// belong to one stream alone, which a captured graph cannot promise.
//
// Not measured on a GPU. The emulator counts no bank conflict in reads and sums; cp.async of int4
// with 17 rows or more meets banks 1.3 times (rows of 64 + 16 bytes, a pad for the reads), and
// scales, 2 bytes a row and group, take a sector each the first time. ptxas: no spills, up to 128
// registers (two blocks), with 64 rows up to 221 (one).
#include <algorithm>

#include "cuda/quantized_weight.cuh"

namespace fastlm {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

template <class T>
struct Rows {
  const T* x;                 // (rows, width), rows x_stride apart
  const float *scale, *sums;  // (runs, scale_stride): of int8 x; sum of q times scale
  int rows, width;
  int64_t x_stride, scale_stride;
  int granule;
};

struct Output {
  void* y;  // (rows, n)
  DType dtype;
  const void* bias;  // (n), or null
  DType bias_dtype;
  float* parts;  // (parts, rows, n); null: one part
  int part_tiles;
};

// NT: blocks of 8 rows of x. The more rows it has, the more rows of W share them: a block's, by way
// of the L2, and a warp's (TILES of 16), whose reads of x from shared memory, 4 KB for 64 rows of
// 32 columns at 128 bytes a clock, would take longer than 16 rows' instructions.
template <int BITS, class T, int NT>
struct Shape {
  static constexpr bool kInteger = std::is_same_v<T, int8_t>;
  static constexpr int kTiles = NT < 4 ? 1 : 2;
  static constexpr int kWarpsN = NT == 1 ? 2 : 4, kWarpsK = kWarps / kWarpsN;
  static constexpr int kRange = 128 / kTiles, kSteps = kRange / 32;  // columns of a warp in a tile
  static constexpr int kN = 16 * kTiles * kWarpsN, kM = 8 * NT, kColumns = kRange * kWarpsK;
  static constexpr int kCodeBytes = kColumns * BITS / 8, kXBytes = kColumns * sizeof(T);
  // 8 (codes of int4), 4 (of int8, x of int8) or 2 rows (x of 16 bits) fill the banks together
  static constexpr int kCodeStride = kCodeBytes + 4 * BITS;
  static constexpr int kXStride = kXBytes + 32 * sizeof(T);
  static constexpr int kStage = kN * kCodeStride + kM * kXStride;
  // 96 KB: two blocks on an A100 or H100 with room for L1, one where 99 KB is all there is
  static constexpr int kStages = 4 * kStage <= 98304 ? 4 : 98304 / kStage;
  static constexpr int kProducts = kInteger ? 1 : 2;  // instructions of a step and 8 rows of x
  static constexpr int kSumStride = kN + 4;           // lanes of a store 8 banks apart
  static_assert(kStages >= 2 && kWarpsK * kM * kSumStride * 4 <= kStages * kStage);
};

// Copies ROWS rows of BYTES bytes of a matrix to shared memory, STRIDE apart, kBytes a thread and
// pass; zeros for what the matrix does not have.
template <int ROWS, int BYTES, int STRIDE>
struct Copier {
  const unsigned char* from;  // this thread's first bytes in the first tile
  int64_t row_bytes;
  int rows, valid;  // left from there: rows, bytes of a row

  DEVICE Copier(const void* matrix, int64_t row_bytes, int64_t column, int rows, int valid,
                int bytes)
      : row_bytes(row_bytes) {
    const int row = threadIdx.x / (BYTES / bytes), at = threadIdx.x % (BYTES / bytes) * bytes;
    from = static_cast<const unsigned char*>(matrix) + row * row_bytes + column + at;
    this->rows = rows - row;
    this->valid = valid - at;
  }

  // The tile `tile` tiles behind the first.
  template <int kBytes>
  DEVICE void copy(unsigned char* to, int tile) const {
    constexpr int kRow = BYTES / kBytes,
                  kPass = kThreads / kRow;  // chunks of a row, rows of a pass
    static_assert(kThreads % kRow == 0 && (ROWS % kPass == 0 || ROWS < kPass));
    const unsigned char* source = from + static_cast<int64_t>(tile) * BYTES;
    const int left = min(max(valid - tile * BYTES, 0), kBytes);
    to += threadIdx.x / kRow * STRIDE + threadIdx.x % kRow * kBytes;
    if (ROWS < kPass && threadIdx.x / kRow >= ROWS) return;
#pragma unroll
    for (int i = 0; i < (ROWS + kPass - 1) / kPass; ++i) {
      const int bytes = i * kPass < rows ? left : 0;
      if constexpr (kBytes == 1)
        store(to + i * kPass * STRIDE, bytes ? load(source) : static_cast<unsigned char>(0));
      else
        cp_async<kBytes>(to + i * kPass * STRIDE, source, bytes);
      source += kPass * row_bytes;
    }
  }
};

DEVICE uint32_t pair_of(float a, float b, bfloat16) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&p);
}
DEVICE uint32_t pair_of(float a, float b, float16) {
  const __half2 p = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&p);
}

template <int WORDS>
DEVICE void load_words(uint32_t (&words)[WORDS], const unsigned char* p) {
  const auto v = load(reinterpret_cast<const Vector<uint32_t, WORDS>*>(p));
#pragma unroll
  for (int i = 0; i < WORDS; ++i) words[i] = v.at[i];
}

// Scales and offsets of a lane's two rows in a tile of W.
struct Factors {
  float scale[2], zero[2];
};
DEVICE Factors load_factors(const Weight& w, const int (&row)[2], int group) {
  Factors f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t at = static_cast<int64_t>(row[r]) * w.groups + group;
    f.scale[r] = load_float(w.scales, w.factors, at);
    f.zero[r] = w.zeros ? load_float(w.zeros, w.factors, at) : 0.0f;
  }
  return f;
}

// The left operands of one step of 32 columns, from this lane's octets of two rows of W.
template <bool EXACT, int BITS>
DEVICE void operands_of(const uint32_t (&octets)[2][BITS / 4], const Factors&, uint32_t (&a)[1][4],
                        int8_t) {
  uint32_t q[2][2];
  to_bytes(octets[0], q[0]);
  to_bytes(octets[1], q[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[0][i] = q[i % 2][i / 2];
}
template <bool EXACT, int BITS, class T>
DEVICE void operands_of(const uint32_t (&octets)[2][BITS / 4], const Factors& f,
                        uint32_t (&a)[2][4], T kind) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pair[4];
    if constexpr (EXACT) {
      to_pairs(octets[r], pair, kind);
    } else {
      float q[8];
      to_floats(octets[r], q);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] =
            pair_of(q[2 * i] * f.scale[r] + f.zero[r], q[2 * i + 1] * f.scale[r] + f.zero[r], kind);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + r] = pair[i];
  }
}

// ALIGNED: rows of codes and of x are, to 16 bytes; otherwise one variant serves all.
template <bool EXACT, int BITS, class T, int NT, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, ALIGNED&& NT < 8 ? 2 : 1)
    matrix_kernel(Rows<T> p, Weight w, Output out) {
  using S = Shape<BITS, T, NT>;
  using Sum = std::conditional_t<S::kInteger, int, float>;
  constexpr Sum kZero = S::kInteger ? kIntegerZero : 0;
  // steps whose operands are made at once: they are scaled together, but lie in registers
  constexpr int kUnit = EXACT ? S::kSteps : 1;
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_n = warp % S::kWarpsN, warp_k = warp / S::kWarpsN;
  const int first_m = blockIdx.x * S::kM, first_n = blockIdx.y * S::kN;
  const int first = blockIdx.z * out.part_tiles;
  const int tiles =
      min(out.part_tiles, (w.k + S::kColumns - 1) / S::kColumns - first);  // of this part
  const bool each = w.groups > 1 && w.group % S::kRange;                   // a scale for every step

  const int granule = ALIGNED ? 16 : min(w.granule, 4),
            x_granule = ALIGNED ? 16 : min(p.granule, 4);
  const Copier<S::kN, S::kCodeBytes, S::kCodeStride> code_copier(
      w.codes + static_cast<int64_t>(first_n) * w.row_bytes, w.row_bytes,
      static_cast<int64_t>(first) * S::kCodeBytes, w.n - first_n,
      w.row_bytes - first * S::kCodeBytes, granule);
  const Copier<S::kM, S::kXBytes, S::kXStride> x_copier(
      p.x + first_m * p.x_stride, p.x_stride * sizeof(T), static_cast<int64_t>(first) * S::kXBytes,
      p.rows - first_m, (p.width - first * S::kColumns) * static_cast<int>(sizeof(T)), x_granule);
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      unsigned char* stage = shared + tile % S::kStages * S::kStage;
      unsigned char* x = stage + S::kN * S::kCodeStride;
      if constexpr (ALIGNED) {
        code_copier.template copy<16>(stage, tile);
        x_copier.template copy<16>(x, tile);
      } else {
        if (granule == 4)
          code_copier.template copy<4>(stage, tile);
        else
          code_copier.template copy<1>(stage, tile);
        if (x_granule == 4)
          x_copier.template copy<4>(x, tile);
        else
          x_copier.template copy<1>(x, tile);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) copy(s);

  int row[S::kTiles][2];  // rows behind the last one count with its scales and are not stored
#pragma unroll
  for (int i = 0; i < 2 * S::kTiles; ++i)
    row[i / 2][i % 2] = min(first_n + warp_n * 16 * S::kTiles + lane / 4 + 8 * i, w.n - 1);
  float total[S::kTiles][NT][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int column = (first + tile) * S::kColumns + warp_k * S::kRange;
    Factors f[kUnit][S::kTiles];
    if (EXACT && !each) {  // used behind the products
      const int group = w.group_of(column);
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) f[kUnit - 1][i] = load_factors(w, row[i], group);
    }
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // of all threads; and the stage filled next was read
    copy(tile + S::kStages - 1);
    const unsigned char* stage = shared + tile % S::kStages * S::kStage;
    const unsigned char* codes = stage + (warp_n * 16 * S::kTiles + lane / 4) * S::kCodeStride +
                                 warp_k * (S::kRange * BITS / 8) + lane % 4 * BITS;
    const unsigned char* x = stage + S::kN * S::kCodeStride + lane / 4 * S::kXStride +
                             (warp_k * S::kRange + lane % 4 * 8) * sizeof(T);
#pragma unroll
    for (int unit = 0; unit < S::kSteps; unit += kUnit) {
      uint32_t a[kUnit][S::kTiles][S::kProducts][4];
#pragma unroll
      for (int s = 0; s < kUnit; ++s) {
        const int step = unit + s;
        const int group = w.group_of(column + 32 * step + (EXACT ? 0 : lane % 4 * 8));
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          if (!EXACT || each) f[s][i] = load_factors(w, row[i], group);
          uint32_t octets[2][BITS / 4];
          load_words(octets[0], codes + 16 * i * S::kCodeStride + step * 4 * BITS);
          load_words(octets[1], codes + (16 * i + 8) * S::kCodeStride + step * 4 * BITS);
          operands_of<EXACT, BITS>(octets, f[s][i], a[s][i], T{});
        }
      }
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        Sum sums[S::kTiles][4];
#pragma unroll
        for (int i = 0; i < 4 * S::kTiles; ++i) sums[i / 4][i % 4] = kZero;
#pragma unroll
        for (int s = 0; s < kUnit; ++s) {
          uint32_t b[2 * S::kProducts];
          load_words(b, x + t * 8 * S::kXStride + (unit + s) * 32 * sizeof(T));
#pragma unroll
          for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
            for (int j = 0; j < S::kProducts; ++j) {
              if constexpr (EXACT)
                mma(sums[i], a[s][i][j], {b[2 * j], b[2 * j + 1]}, T{});
              else
                mma(total[i][t], a[s][i][j], {b[2 * j], b[2 * j + 1]}, T{});
            }
          if (!EXACT || (s < kUnit - 1 && !each)) continue;
          Vector<float, 2> x_scale{{1, 1}}, x_sum{};
          bool begins = false;
          if constexpr (S::kInteger) {
            const int from = column + 32 * (each ? unit + s : unit);  // these sums' first column
            const int64_t at = w.run_of(from) * p.scale_stride + first_m + 8 * t + lane % 4 * 2;
            x_scale = load(reinterpret_cast<const Vector<float, 2>*>(p.scale + at));
            begins = w.zeros && w.begins_run(from);
            if (begins) x_sum = load(reinterpret_cast<const Vector<float, 2>*>(p.sums + at));
          }
#pragma unroll
          for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float scale = f[s][i].scale[e / 2];
              if constexpr (S::kInteger) scale *= x_scale.at[e % 2] * (1.0f / kIntegerUnit<BITS>);
              total[i][t][e] += value_of(sums[i][e]) * scale;
              if (begins) total[i][t][e] += f[s][i].zero[e / 2] * x_sum.at[e % 2];
              sums[i][e] = kZero;
            }
        }
      }
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // the stages' memory now holds sums: (warps_k, m, n)
  float* const part = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int t = 0; t < NT; ++t)
#pragma unroll
    for (int i = 0; i < 4 * S::kTiles; ++i)
      store(part + (warp_k * S::kM + 8 * t + lane % 4 * 2 + i % 2) * S::kSumStride +
                warp_n * 16 * S::kTiles + lane / 4 + i / 2 * 8,
            total[i / 4][t][i % 4]);
  __syncthreads();
  for (int i = threadIdx.x; i < S::kM * S::kN; i += kThreads) {
    const int m = i / S::kN, n = i % S::kN;
    if (first_m + m >= p.rows || first_n + n >= w.n) continue;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < S::kWarpsK; ++k) sum += load(part + (k * S::kM + m) * S::kSumStride + n);
    const int64_t at = static_cast<int64_t>(first_m + m) * w.n + first_n + n;
    if (out.parts) {
      store(out.parts + static_cast<int64_t>(blockIdx.z) * p.rows * w.n + at, sum);
    } else {
      if (out.bias) sum += load_float(out.bias, out.bias_dtype, first_n + n);
      store_float(out.y, out.dtype, at, sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) add_parts(Output out, int parts, int n, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
  for (int part = 0; part < parts; ++part) sum += load(out.parts + part * size + i);
  if (out.bias) sum += load_float(out.bias, out.bias_dtype, i % n);
  store_float(out.y, out.dtype, i, sum);
}

// Calls f with the number of blocks of 8 rows that a block of threads takes.
template <class F>
void with_tiles(int64_t rows, F&& f) {
  if (rows <= 8) return f(std::integral_constant<int, 1>{});
  if (rows <= 16) return f(std::integral_constant<int, 2>{});
  if (rows <= 32) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 8>{});
}

}  // namespace

int quantized_linear_parts(int64_t rows, int64_t n, int64_t k, int bits, int multiprocessors) {
  int parts = 1;
  with_tiles(rows, [&](auto nt) {
    using S = Shape<4, bfloat16, decltype(nt)::value>;
    const int64_t tiles = ceil_div(k, S::kColumns);
    const int64_t blocks = static_cast<int64_t>(ceil_div(rows, S::kM)) * ceil_div(n, S::kN);
    // a block a multiprocessor keeps 24 KB of codes in flight, enough; a part long enough to fill
    // its stages; and partial sums, written and read, of no more bytes than the codes
    const int64_t most =
        std::min(std::min(multiprocessors / blocks, tiles / 4), k * bits / (64 * rows));
    const int part_tiles = ceil_div(tiles, std::max(most, int64_t{1}));
    parts = ceil_div(tiles, part_tiles);
  });
  return parts;
}

void quantized_linear_matrix(TensorView x, OptionalTensor x_scale, OptionalTensor x_sums,
                             TensorView qdata, TensorView scales, OptionalTensor zeros,
                             OptionalTensor bias, int bits, int64_t group_size, int64_t k,
                             TensorView y, OptionalTensor parts, Stream stream) {
  check_contiguous("y", y);
  check_size("y", "rows", x.size(0), y.size(0));
  check_size("y", "columns", qdata.size(0), y.size(1));
  const Weight w = weight_of(qdata, scales, zeros, bits, group_size, k);
  const bool by_steps = w.groups == 1 || w.group % 32 == 0;
  if (x_scale && !by_steps)
    throw std::invalid_argument("group_size: wanted a multiple of 32, got " +
                                std::to_string(group_size));
  const int count = parts ? static_cast<int>(parts->size(0)) : 1;
  if (parts) {
    check_contiguous("parts", *parts);
    check_size("parts", "elements", count * y.numel(), parts->numel());
  }
  Output out{nullptr,
             y.dtype(),
             any_float(bias, "bias"),
             bias ? bias->dtype() : DType::f32,
             output<float>(parts, "parts"),
             0};
  with_device_float(y.dtype(), "y",
                    [&](auto element) { out.y = output<decltype(element)>(y, "y"); });
  const int rows = static_cast<int>(x.size(0));
  const auto start = [&](auto* from, auto exact, auto b, auto nt, auto aligned) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    constexpr int kBits = decltype(b)::value, kNT = decltype(nt)::value;
    using S = Shape<kBits, T, kNT>;
    const int64_t stride = x.stride(0);
    const Rows<T> p{from,
                    input<float>(x_scale, "x_scale"),
                    input<float>(x_sums, "x_sums"),
                    rows,
                    static_cast<int>(x.size(1)),
                    stride,
                    x_scale ? x_scale->size(1) : 0,
                    granule_of(from, stride * static_cast<int64_t>(sizeof(T)))};
    out.part_tiles = ceil_div(ceil_div(k, S::kColumns), count);
    launch({"quantized_linear matrix", dim3(ceil_div(rows, S::kM), ceil_div(w.n, S::kN), count),
            dim3(kThreads), static_cast<size_t>(S::kStages) * S::kStage,
            reinterpret_cast<cudaStream_t>(stream)},
           matrix_kernel<decltype(exact)::value, kBits, T, kNT, decltype(aligned)::value>, p, w,
           out);
  };
  const auto with_rows = [&](auto* from) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    using Integer = std::is_same<T, int8_t>;
    const bool aligned = granule_of(from, x.stride(0) * sizeof(T)) == 16 && w.granule == 16;
    const auto with_bits = [&](auto b) {
      if (!aligned)
        return start(from, Integer{}, b, std::integral_constant<int, 8>{}, std::false_type{});
      with_tiles(rows, [&](auto nt) {
        if constexpr (!Integer::value)
          if (zeros || !by_steps) return start(from, std::false_type{}, b, nt, std::true_type{});
        start(from, std::true_type{}, b, nt, std::true_type{});
      });
    };
    if (bits == 4)
      with_bits(std::integral_constant<int, 4>{});
    else
      with_bits(std::integral_constant<int, 8>{});
  };
  if (x_scale)
    with_rows(input<int8_t>(x, "x"));
  else if (x.dtype() == DType::bf16)
    with_rows(input<bfloat16>(x, "x"));
  else
    with_rows(input<float16>(x, "x"));
  if (count == 1) return;
  const int64_t size = y.numel();
  launch({"quantized_linear add_parts", dim3(ceil_div(size, kThreads)), dim3(kThreads), 0,
          reinterpret_cast<cudaStream_t>(stream)},
         add_parts, out, count, w.n, size);
}

}  // namespace fastlm
