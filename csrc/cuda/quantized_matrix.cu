// y = x W^T + bias by matrix instructions, W in int8 or int4: bfloat16 and float16 x of up to 64
// rows a block, int8 x (quantized_round.cu) of any number.
//
// W is the left operand: y^T (16 x 8) += W (16 x 16) x^T (16 x 8), so that a few rows of x waste
//     little.
//
//     block (m, stripe), 8 warps, a tile of K at a time:              k ->
//       codes      n [ warps_n x 16 TILES rows ][ warps_k x RANGE ]    read once per block of m
//       x          m [ 8 NT rows ][ warps_k x RANGE columns ]          read once per block of n
//       warp       16 TILES rows of W, all of x's, RANGE columns in steps of 32
//
// cp.async copies both to shared memory as they are, STAGES tiles deep. The codes need no other
// layout: an instruction's k may be any columns as long as both operands agree. Lane c of the four
// of a row holds the octet 8 c of a step, so codes are one 32-bit (int4) or 64-bit (int8) read and
// x one of 128 bits (int8: 64). Rows in shared memory are padded so that these reads have no bank
// conflict. Rejected: a repacked weight. It would save the pad and 6 of 8 reads of codes, 6 of 150
// instructions per 128 columns of a warp, and cost a second copy of every checkpoint.
//
// FORM depends on the groups. Where a group is a multiple of 32 columns, the instructions multiply
// q, which is exact in 16 bits, and sums in float32 are scaled. A warp's whole range is scaled at
// once where it is within one group (kScales; with offsets kOffsets, where one more instruction
// sums x to multiply the offset by); otherwise each step of 32 columns (kNarrow). The sums of int8
// x are computed before, so there offsets need no form of their own. For any other group (kAny), w
// = scale q + zero is computed in float32 and rounded to x's dtype, as dequantize does.
//
// W's tiles are numbered row by row and divided among blocks in stripes. As a rule a stripe is a
// whole row of tiles. Where that leaves multiprocessors idle, stripes are equal shares; rows that
// are cut give parts in float32, which add_parts adds in order. Rejected: a counter by which the
// last block adds. It would save a launch, but must be zero before and belong to one stream, which
// a captured graph cannot guarantee.
//
// Not measured on a GPU. The emulator counts no bank conflict in reads and sums. cp.async of int4
// with 17 rows or more takes 1.3 passes (rows of 64 + 16 bytes, padded for the reads), and scales,
// 2 bytes per row and group, take a sector each the first time. ptxas: no spills, up to 128
// registers (two blocks per multiprocessor), with 64 rows up to 255 (one block).
#include <algorithm>

#include "cuda/quantized_weight.cuh"

namespace fastlm {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

enum Form { kScales, kOffsets, kNarrow, kAny };

template <class T>
struct MatrixInput {
  const T* x;                 // (rows, width), row stride x_stride
  const float *scale, *sums;  // (runs, scale_stride) for int8 x: scale; scale times the sum of q
  int rows, width;
  int64_t x_stride, scale_stride;
  int granule;
};

struct MatrixOutput {
  void* y;  // (rows, n)
  DType dtype;
  const void* bias;  // (n), or null
  DType bias_dtype;
  float* parts;  // (parts, rows, n); null: no row of tiles is cut
  int stripe;    // tiles per block
};

// NT: blocks of 8 rows of x. The more rows x has, the more rows of W a block and a warp (TILES of
// 16) take: the block to read x from L2 less often, the warp because reading x from shared memory
// (4 KB for 64 rows of 32 columns, at 128 bytes per clock) takes longer than the instructions of 16
// rows.
template <int BITS, class T, int NT>
struct MatrixShape {
  static constexpr bool kInteger = std::is_same_v<T, int8_t>;
  static constexpr int kTiles = NT < 4 ? 1 : 2;
  static constexpr int kWarpsN = NT == 1 ? 2 : 4, kWarpsK = kWarps / kWarpsN;
  static constexpr int kRange = 128 / kTiles, kSteps = kRange / 32;  // a warp's columns in a tile
  static constexpr int kN = 16 * kTiles * kWarpsN, kM = 8 * NT, kColumns = kRange * kWarpsK;
  static constexpr int kCodeBytes = kColumns * BITS / 8, kXBytes = kColumns * sizeof(T);
  // together, 8 rows (codes of int4), 4 (of int8; x of int8) or 2 (x of 16 bits) cover all banks
  static constexpr int kCodeStride = kCodeBytes + 4 * BITS;
  static constexpr int kXStride = kXBytes + 32 * sizeof(T);
  static constexpr int kStage = kN * kCodeStride + kM * kXStride;
  // 96 KB: two blocks on an A100 or H100 with room left for L1; one where the limit is 99 KB
  static constexpr int kStages = 4 * kStage <= 98304 ? 4 : 98304 / kStage;
  static constexpr int kProducts = kInteger ? 1 : 2;  // instructions per step and 8 rows of x
  static constexpr int kSumStride = kN + 4;           // lanes of a store are 8 banks apart
  static_assert(kStages >= 2 && kWarpsK * kM * kSumStride * 4 <= kStages * kStage);
};

template <class S>
DEVICE int tiles_of(const DeviceWeight& w) {  // tiles per row of tiles
  return (w.k + S::kColumns - 1) / S::kColumns;
}

// Copies consecutive tiles of ROWS rows of BYTES bytes of a matrix to shared memory, STRIDE apart;
// a thread copies kBytes per pass (a divisor of the matrix's row length in bytes); zeros outside
// the matrix. The address is advanced from tile to tile: computing it from the tile's number takes
// 20 instructions.
template <int ROWS, int BYTES, int STRIDE>
struct Copier {
  const unsigned char* from;  // this thread's first byte in the next tile
  int64_t row_bytes;

  DEVICE Copier(const void* tile, int64_t row_bytes, int bytes, int thread) : row_bytes(row_bytes) {
    const int row = thread / (BYTES / bytes), at = thread % (BYTES / bytes) * bytes;
    from = static_cast<const unsigned char*>(tile) + row * row_bytes + at;
  }

  // rows, bytes: what is left of the matrix from this tile's first on
  template <int kBytes>
  DEVICE void copy(unsigned char* to, int rows, int bytes) {
    constexpr int kRow = BYTES / kBytes,
                  kPass = kThreads / kRow;  // chunks per row, rows per pass
    static_assert(kThreads % kRow == 0 && (ROWS % kPass == 0 || ROWS < kPass));
    const int row = threadIdx.x / kRow, at = threadIdx.x % kRow * kBytes;
    to += row * STRIDE + at;
    const unsigned char* source = from;
    from += BYTES;
    if (ROWS < kPass && row >= ROWS) return;
#pragma unroll
    for (int i = 0; i < (ROWS + kPass - 1) / kPass; ++i) {
      const bool there = at < bytes && row + i * kPass < rows;
      if constexpr (kBytes == 1)
        store(to + i * kPass * STRIDE, there ? load(source) : static_cast<unsigned char>(0));
      else  // all or nothing takes one predicate, a number of bytes 7 instructions
        cp_async<kBytes>(to + i * kPass * STRIDE, source, there ? kBytes : 0);
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

// Scales and offsets of a lane's two rows in a tile of W, as in memory.
struct ScaleBits {
  uint32_t scale[2], zero[2];
};
DEVICE ScaleBits load_factors(const DeviceWeight& w, bool zeros, const int (&first)[2], int group) {
  ScaleBits f;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    f.scale[r] = load_bits(w.scales, w.factors, first[r] + group);
    f.zero[r] = zeros ? load_bits(w.zeros, w.factors, first[r] + group) : 0;
  }
  return f;
}

// The left operands of one step of 32 columns, from this lane's octets of two rows of W.
template <Form FORM, int BITS>
DEVICE void operands_of(const uint32_t (&octets)[2][BITS / 4], const float (&)[2],
                        const float (&)[2], uint32_t (&a)[1][4], int8_t) {
  uint32_t q[2][2];
  to_bytes(octets[0], q[0]);
  to_bytes(octets[1], q[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[0][i] = q[i % 2][i / 2];
}
template <Form FORM, int BITS, class T>
DEVICE void operands_of(const uint32_t (&octets)[2][BITS / 4], const float (&scale)[2],
                        const float (&zero)[2], uint32_t (&a)[2][4], T kind) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t pair[4];
    if constexpr (FORM != kAny) {
      to_pairs(octets[r], pair, kind);
    } else {
      float q[8];
      to_floats(octets[r], q);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pair[i] = pair_of(q[2 * i] * scale[r] + zero[r], q[2 * i + 1] * scale[r] + zero[r], kind);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + r] = pair[i];
  }
}

template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;  // two

// Multiplies `tiles` tiles of a row of tiles, from tile `first` on, and writes y or a part.
template <Form FORM, int BITS, class T, int NT, bool ALIGNED>
DEVICE void multiply(const MatrixInput<T>& p, const DeviceWeight& w, const MatrixOutput& out,
                     unsigned char* shared, int n_tile, int first, int tiles) {
  using S = MatrixShape<BITS, T, NT>;
  using Sum = std::conditional_t<S::kInteger, int, float>;
  constexpr Sum kZero = S::kInteger ? kIntegerZero : 0;
  constexpr bool kExact = FORM != kAny;
  const bool zeros =
      FORM == kOffsets || ((S::kInteger || FORM == kNarrow || FORM == kAny) && w.zeros);
  // The shuffle tells nvcc that the value is the same in all lanes: it computes with it once, and
  // does not keep addresses of x for the whole stripe, which would spill.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int thread = warp * 32 + lane;
  const int warp_n = warp % S::kWarpsN, warp_k = warp / S::kWarpsN;
  const int first_m = blockIdx.x * S::kM, first_n = n_tile * S::kN;

  const int granule = ALIGNED ? 16 : min(w.granule, 4),
            x_granule = ALIGNED ? 16 : min(p.granule, 4);
  Copier<S::kN, S::kCodeBytes, S::kCodeStride> code_copier(
      w.codes + static_cast<int64_t>(first_n) * w.row_bytes + first * S::kCodeBytes, w.row_bytes,
      granule, thread);
  Copier<S::kM, S::kXBytes, S::kXStride> x_copier(p.x + first_m * p.x_stride + first * S::kColumns,
                                                  p.x_stride * sizeof(T), x_granule, thread);
  const auto copy = [&](int tile) {
    if (tile < tiles) {
      unsigned char* to = shared + tile % S::kStages * S::kStage;
      unsigned char* x = to + S::kN * S::kCodeStride;
      const int rows = w.n - first_n, x_rows = p.rows - first_m;
      const int bytes = w.row_bytes - (first + tile) * S::kCodeBytes;
      const int x_bytes = (p.width - (first + tile) * S::kColumns) * static_cast<int>(sizeof(T));
      if constexpr (ALIGNED) {
        code_copier.template copy<16>(to, rows, bytes);
        x_copier.template copy<16>(x, x_rows, x_bytes);
      } else {
        if (granule == 4)
          code_copier.template copy<4>(to, rows, bytes);
        else
          code_copier.template copy<1>(to, rows, bytes);
        if (x_granule == 4)
          x_copier.template copy<4>(x, x_rows, x_bytes);
        else
          x_copier.template copy<1>(x, x_rows, x_bytes);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) copy(s);

  int factors[S::kTiles][2];  // index of a row's first scale; rows beyond W have the last one's
#pragma unroll
  for (int i = 0; i < 2 * S::kTiles; ++i)
    factors[i / 2][i % 2] =
        min(first_n + warp_n * 16 * S::kTiles + lane / 4 + 8 * i, w.n - 1) * w.groups;
  float total[S::kTiles][NT][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int column = (first + tile) * S::kColumns + warp_k * S::kRange;
    ScaleBits f[S::kTiles];  // of the first step: loads issued here have arrived after the barrier
    const auto read = [&](int step) {
      const int group = w.group_of(column + 32 * step + (kExact ? 0 : lane % 4 * 8));
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) f[i] = load_factors(w, zeros, factors[i], group);
    };
    read(0);
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // all copies have arrived, and all threads have read the stage to fill next
    copy(tile + S::kStages - 1);
    const unsigned char* stage = shared + tile % S::kStages * S::kStage;
    const unsigned char* codes = stage + (warp_n * 16 * S::kTiles + lane / 4) * S::kCodeStride +
                                 warp_k * (S::kRange * BITS / 8) + lane % 4 * BITS;
    const unsigned char* x = stage + S::kN * S::kCodeStride + lane / 4 * S::kXStride +
                             (warp_k * S::kRange + lane % 4 * 8) * sizeof(T);
    // kUnit steps from `step` on, within one group: their sums are scaled once
    const auto add = [&](int step, auto steps) {
      constexpr int kUnit = decltype(steps)::value;
      float scale[S::kTiles][2], zero[S::kTiles][2];
#pragma unroll
      for (int i = 0; i < S::kTiles * 2; ++i) {
        scale[i / 2][i % 2] = float_of(f[i / 2].scale[i % 2], w.factors);
        zero[i / 2][i % 2] = float_of(f[i / 2].zero[i % 2], w.factors);
      }
      if (kUnit == 1 && step < S::kSteps - 1) read(step + 1);
      uint32_t a[kUnit][S::kTiles][S::kProducts][4];
#pragma unroll
      for (int s = 0; s < kUnit; ++s)
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          uint32_t octets[2][BITS / 4];
          load_words(octets[0], codes + 16 * i * S::kCodeStride + (step + s) * 4 * BITS);
          load_words(octets[1], codes + (16 * i + 8) * S::kCodeStride + (step + s) * 4 * BITS);
          operands_of<FORM, BITS>(octets, scale[i], zero[i], a[s][i], T{});
        }
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        Sum sums[S::kTiles][4];
        [[maybe_unused]] float x_sums[4] = {};  // 16-bit x: the sums of two rows of x, twice
#pragma unroll
        for (int i = 0; i < 4 * S::kTiles; ++i) sums[i / 4][i % 4] = kZero;
#pragma unroll
        for (int s = 0; s < kUnit; ++s) {
          uint32_t b[2 * S::kProducts];
          load_words(b, x + t * 8 * S::kXStride + (step + s) * 32 * sizeof(T));
#pragma unroll
          for (int j = 0; j < S::kProducts; ++j) {
            const uint32_t columns[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
            for (int i = 0; i < S::kTiles; ++i) {
              if constexpr (kExact)
                mma(sums[i], a[s][i][j], columns, T{});
              else
                mma(total[i][t], a[s][i][j], columns, T{});
            }
            if constexpr (kExact && !S::kInteger)
              if (zeros) mma(x_sums, {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}, columns, T{});
          }
        }
        if constexpr (kExact) {
          [[maybe_unused]] Vector<float, 2> x_scale{{1, 1}};
          Vector<float, 2> x_sum{{x_sums[0], x_sums[1]}};
          bool offset = zeros;
          if constexpr (S::kInteger) {
            const int from = column + 32 * step;  // first column of these sums
            const int64_t at = w.run_of(from) * p.scale_stride + first_m + 8 * t + lane % 4 * 2;
            x_scale = load(reinterpret_cast<const Vector<float, 2>*>(p.scale + at));
            offset = zeros && w.begins_run(from);
            if (offset) x_sum = load(reinterpret_cast<const Vector<float, 2>*>(p.sums + at));
          }
#pragma unroll
          for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float factor = scale[i][e / 2];
              if constexpr (S::kInteger) factor *= x_scale.at[e % 2] * (1.0f / kIntegerUnit<BITS>);
              total[i][t][e] += value_of(sums[i][e]) * factor;
              if (offset) total[i][t][e] += zero[i][e / 2] * x_sum.at[e % 2];
            }
        }
      }
    };
    if constexpr (FORM == kScales || FORM == kOffsets) {
      add(0, std::integral_constant<int, S::kSteps>{});
    } else {
#pragma unroll 1  // for registers
      for (int step = 0; step < S::kSteps; ++step) add(step, std::integral_constant<int, 1>{});
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // from here on the stages' memory holds sums: (warps_k, m, n)
  float* const part = reinterpret_cast<float*>(shared);
  // parts are numbered from the stripe that begins this row of tiles
  const int k_tiles = tiles_of<S>(w);
  const int64_t before = static_cast<int64_t>(blockIdx.y - n_tile * k_tiles / out.stripe) * p.rows;
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
    if (tiles < k_tiles) {
      store(out.parts + before * w.n + at, sum);
    } else {
      if (out.bias) sum += load_float(out.bias, out.bias_dtype, first_n + n);
      store_float(out.y, out.dtype, at, sum);
    }
  }
}

// Blocks per multiprocessor. Two leave 128 registers each; some forms with 32 rows would spill.
template <Form FORM, int BITS, class T, int NT>
constexpr int kBlocks =
    NT < 4 || (NT == 4 && FORM != kAny && (sizeof(T) == 2 || BITS == 4)) ? 2 : 1;

// ALIGNED: rows of codes and of x begin and end at multiples of 16 bytes. One variant serves all
// other operands.
template <Form FORM, int BITS, class T, int NT, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks<FORM, BITS, T, NT>)
    matrix_kernel(MatrixInput<T> p, DeviceWeight w, MatrixOutput out) {
  using S = MatrixShape<BITS, T, NT>;
  DYNAMIC_SHARED(shared);
  const int k_tiles = tiles_of<S>(w), n_tiles = (w.n + S::kN - 1) / S::kN;
  const int begin = blockIdx.y * out.stripe, end = min(begin + out.stripe, n_tiles * k_tiles);
  int n_tile = __shfl_sync(kAllLanes, begin / k_tiles, 0);
  for (int first = begin - n_tile * k_tiles; n_tile * k_tiles + first < end; ++n_tile, first = 0) {
    const int tiles = min(k_tiles - first, end - n_tile * k_tiles - first);
    multiply<FORM, BITS, T, NT, ALIGNED>(p, w, out, shared, n_tile, first, tiles);
    __syncthreads();  // the sums have been read
  }
}

// block (row of x, kThreads columns of y)
__global__ void __launch_bounds__(kThreads)
    add_parts(MatrixOutput out, int rows, int n, int tile_n, int k_tiles) {
  const int row = blockIdx.x, column = blockIdx.y * kThreads + threadIdx.x;
  if (column >= n) return;
  const int first = column / tile_n * k_tiles;
  const int parts = (first + k_tiles - 1) / out.stripe - first / out.stripe + 1;
  if (parts == 1) return;  // matrix_kernel has written it
  const int64_t at = static_cast<int64_t>(row) * n + column, size = static_cast<int64_t>(rows) * n;
  float sum = 0;
  for (int part = 0; part < parts; ++part) sum += load(out.parts + part * size + at);
  if (out.bias) sum += load_float(out.bias, out.bias_dtype, column);
  store_float(out.y, out.dtype, at, sum);
}

// Calls f with NT, the number of blocks of 8 rows of x that a block of threads takes.
template <class F>
void with_tiles(int64_t rows, bool aligned, F&& f) {
  if (!aligned || rows > 32) return f(std::integral_constant<int, 8>{});
  if (rows <= 8) return f(std::integral_constant<int, 1>{});
  if (rows <= 16) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 4>{});
}

template <Form FORM>
using form_of = std::integral_constant<Form, FORM>;

bool rows_are_aligned(const TensorView& x, const TensorView& qdata) {
  const int64_t size = x.dl.dtype.bits / 8;
  const auto bytes = [](const TensorView& t) {
    return static_cast<char*>(t.dl.data) + t.dl.byte_offset;
  };
  return granule_of(bytes(x), x.stride(0) * size) == 16 && x.size(1) * size % 16 == 0 &&
         granule_of(bytes(qdata), qdata.size(1)) == 16;
}

// The largest number of parts into which stripes cut a row of tiles.
int parts_of(int64_t tiles, int64_t stripe) {
  if (stripe % tiles == 0) return 1;
  return tiles % stripe == 0 ? static_cast<int>(tiles / stripe) : ceil_div(tiles - 1, stripe) + 1;
}

}  // namespace

std::pair<int, int> quantized_linear_stripe(TensorView x, TensorView qdata, int bits, int64_t k,
                                            int multiprocessors) {
  std::pair<int, int> result;
  const int64_t rows = x.size(0);
  with_tiles(rows, rows_are_aligned(x, qdata), [&](auto nt) {
    constexpr int kNT = decltype(nt)::value;
    using S = MatrixShape<4, bfloat16, kNT>;  // all dtypes have the same rows and columns per tile
    const int64_t tiles = ceil_div(k, S::kColumns), n_tiles = ceil_div(qdata.size(0), S::kN);
    const int64_t m_tiles = ceil_div(rows, S::kM);
    // The work of a multiprocessor with uncut rows of tiles (with fewer rows of x it is shared by
    // two blocks), and with stripes. A stripe has at least 4 tiles, to fill the stages and so that
    // partial sums, written and read, are no more bytes than the codes.
    const int64_t waves = ceil_div(n_tiles * m_tiles, multiprocessors);
    const int64_t whole = kNT < 8 && waves > 1 ? 0 : waves * tiles;
    const int64_t all = tiles * n_tiles, blocks = std::max<int64_t>(1, multiprocessors / m_tiles);
    int64_t stripe = std::max<int64_t>(ceil_div(all, blocks), 4);
    if (stripe < tiles) stripe = std::max<int64_t>(stripe, ceil_div(tiles * 64 * rows, k * bits));
    // add_parts takes about as long as 8 tiles (16384 weights each, 0.3 to 0.4 us)
    if (whole - stripe <= 8) stripe = tiles;
    stripe = std::max<int64_t>(stripe, ceil_div(all, 65535));  // limit of a grid's y
    result.first = static_cast<int>(stripe);
    result.second = parts_of(tiles, stripe);
  });
  return result;
}

void quantized_linear_matrix(TensorView x, OptionalTensor x_scale, OptionalTensor x_sums,
                             TensorView qdata, TensorView scales, OptionalTensor zeros,
                             OptionalTensor bias, int bits, int64_t group_size, int64_t k,
                             TensorView y, int stripe, OptionalTensor parts, Stream stream) {
  check_contiguous("y", y);
  check_size("y", "rows", x.size(0), y.size(0));
  check_size("y", "columns", qdata.size(0), y.size(1));
  const DeviceWeight w = weight_of(qdata, scales, zeros, bits, group_size, k);
  const bool by_steps = w.groups == 1 || w.group % 32 == 0;
  if (x_scale && !by_steps)
    throw std::invalid_argument("group_size: wanted a multiple of 32, got " +
                                std::to_string(group_size));
  if (stripe < 1)
    throw std::invalid_argument("stripe: wanted at least 1, got " + std::to_string(stripe));
  if (parts) {
    check_contiguous("parts", *parts);
    check_size("parts", "elements", parts->size(0) * y.numel(), parts->numel());
  }
  MatrixOutput out{nullptr,
                   y.dtype(),
                   any_float(bias, "bias"),
                   bias ? bias->dtype() : DType::f32,
                   output<float>(parts, "parts"),
                   stripe};
  with_device_float(y.dtype(), "y",
                    [&](auto element) { out.y = output<decltype(element)>(y, "y"); });
  const int rows = static_cast<int>(x.size(0));
  int tile_n = 0, tile_k = 0;
  const auto start = [&](auto* from, auto form, auto b, auto nt, auto aligned) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    constexpr int kBits = decltype(b)::value, kNT = decltype(nt)::value;
    using S = MatrixShape<kBits, T, kNT>;
    const int64_t stride = x.stride(0), size = sizeof(T);
    const MatrixInput<T> p{from,
                           input<float>(x_scale, "x_scale"),
                           input<float>(x_sums, "x_sums"),
                           rows,
                           static_cast<int>(x.size(1)),
                           stride,
                           x_scale ? x_scale->size(1) : 0,
                           granule_of(from, stride * size | x.size(1) * size)};
    tile_n = S::kN;
    tile_k = S::kColumns;
    const int64_t tiles = ceil_div(k, tile_k), all = tiles * ceil_div(w.n, tile_n);
    const int64_t given = parts ? parts->size(0) : 0, wanted = parts_of(tiles, stripe);
    if (wanted > 1 && given < wanted) check_size("parts", "matrices", wanted, given);
    launch({"quantized_linear matrix", dim3(ceil_div(rows, S::kM), ceil_div(all, stripe)),
            dim3(kThreads), static_cast<size_t>(S::kStages) * S::kStage,
            reinterpret_cast<cudaStream_t>(stream)},
           matrix_kernel<decltype(form)::value, kBits, T, kNT, decltype(aligned)::value>, p, w,
           out);
  };
  const auto with_rows = [&](auto* from) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    const bool aligned = rows_are_aligned(x, qdata);
    const auto with_bits = [&](auto b) {
      constexpr int kBits = decltype(b)::value;
      with_tiles(rows, aligned, [&](auto nt) {
        constexpr int kNT = decltype(nt)::value;
        const auto aligned_form = [&](auto form) { start(from, form, b, nt, std::true_type{}); };
        const bool wide = w.groups == 1 || w.group % MatrixShape<kBits, T, kNT>::kRange == 0;
        constexpr bool kInteger = std::is_same_v<T, int8_t>;
        constexpr Form kRest = kInteger ? kNarrow : kAny;
        if constexpr (kNT == 8)
          if (!aligned) return start(from, form_of<kRest>{}, b, nt, std::false_type{});
        if constexpr (!kInteger) {
          if (!by_steps) return aligned_form(form_of<kAny>{});
          if constexpr (kNT < 4)  // with more rows kNarrow takes as few instructions, and fits
            if (wide && zeros) return aligned_form(form_of<kOffsets>{});
        }
        if (wide && (kInteger || !zeros))
          aligned_form(form_of<kScales>{});
        else
          aligned_form(form_of<kNarrow>{});
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
  if (!parts) return;
  launch({"quantized_linear add_parts", dim3(rows, ceil_div(w.n, kThreads)), dim3(kThreads), 0,
          reinterpret_cast<cudaStream_t>(stream)},
         add_parts, out, rows, w.n, tile_n, ceil_div(k, tile_k));
}

}  // namespace fastlm
