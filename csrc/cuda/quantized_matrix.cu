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
// A block takes a stripe of W, one row of tiles after the other (multiply_stripe):
//
//     copy       cp.async: a tile of codes and of x, as they are, to one of kStages stages
//     load       a lane's octets of codes -> the left operands, its octets of x -> the right ones
//     multiply   matrix instructions; sums of exact products -> scaled -> totals (float32)
//     store      totals of the warps_k -> shared memory -> added in order, with bias -> y or a part
//
// Indices:
//
//     m, n, k    row of x, row of W (column of y), column of both
//     n_tile     row of tiles: kN rows of W
//     tile       kColumns columns, of which a warp has kRange from `column` on
//     step       32 columns of that range; UNIT steps are scaled at once
//     i, t       16 of a warp's rows of W (kTiles of them); 8 rows of x (NT of them)
//     j          instruction of a step (kProducts: two of k16, one of k32)
//     g, c       lane / 4, lane % 4
//     r, e       row g + 8 r of 16 rows of W; a lane's e-th sum of four, row r = e / 2
//
// Which elements a lane 4 g + c holds, A for W, B for x^T, D for y^T:
//
//     16 bits, m16n8k16: two per register       int8, m16n8k32: four per register
//     A       k: 2c, 2c+1    2c+8, 2c+9         A       k: 4c .. 4c+3    4c+16 .. 4c+19
//       n: g         a0           a2              n: g         a0              a2
//       n: g+8       a1           a3              n: g+8       a1              a3
//     B                                         B
//       m: g         b0           b1              m: g         b0              b1
//     D       m: 2c    2c+1
//       n: g       d0    d1                     D: the same, in int32
//       n: g+8     d2    d3
//
// An instruction's k may be any columns as long as A and B agree, so the codes need no other
// layout: lane c takes the octet of columns 8 c to 8 c + 7 of a step, and its registers are
//
//     octet       0, 1    2, 3    4, 5    6, 7
//     16 bits     a0 b0   a2 b1   a0 b0   a2 b1     (a1, a3: row g + 8); j = 0, 0, 1, 1
//     int8        a0 b0   a0 b0   a2 b1   a2 b1     (int4: even columns a0, odd ones a2)
//
// so codes are one 32-bit (int4) or 64-bit (int8) read and x one of 128 bits (int8: 64). Rows in
// shared memory are padded so that these reads have no bank conflict. Rejected: a repacked weight.
// It would save the pad and 6 of 8 reads of codes, 6 of 150 instructions per 128 columns of a warp,
// and cost a second copy of every checkpoint.
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
  using X = T;
  static constexpr int kBits = BITS, kNT = NT;
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

// Copies consecutive tiles of ROWS rows of BYTES bytes of a matrix to shared memory, with a row
// stride of STRIDE bytes and zeros outside the matrix. A thread copies kBytes per pass (a divisor
// of the matrix's row length in bytes). The address is advanced from tile to tile: computing it
// from the tile's number takes 20 instructions.
template <int ROWS, int BYTES, int STRIDE>
struct Copier {
  const unsigned char* from;  // this thread's first byte in the next tile
  int64_t row_bytes;

  DEVICE Copier(const void* tile, int64_t row_bytes, int bytes, int thread) : row_bytes(row_bytes) {
    const int row = thread / (BYTES / bytes), at = thread % (BYTES / bytes) * bytes;
    from = static_cast<const unsigned char*>(tile) + row * row_bytes + at;
  }

  // rows, bytes: the rest of the matrix, from this tile's first on
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
      const bool inside = at < bytes && row + i * kPass < rows;
      if constexpr (kBytes == 1)
        store(to + i * kPass * STRIDE, inside ? load(source) : static_cast<unsigned char>(0));
      else  // all or nothing takes one predicate, a number of bytes 7 instructions
        cp_async<kBytes>(to + i * kPass * STRIDE, source, inside ? kBytes : 0);
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

// A thread's part of a block.
template <class S>
struct MatrixThread {
  int number, warp_n, warp_k, g, c;

  DEVICE MatrixThread() {
    // The shuffle tells nvcc that the value is the same in all lanes: it computes with it once, and
    // does not keep addresses of x for the whole stripe, which would spill.
    const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    number = warp * 32 + lane;
    warp_n = warp % S::kWarpsN, warp_k = warp / S::kWarpsN;
    g = lane / 4, c = lane % 4;
  }
};

// Copies the tiles of a stripe to their stages, codes before x.
template <class S, bool ALIGNED>
struct StripeCopier {
  const MatrixInput<typename S::X>& x;
  const DeviceWeight& w;
  unsigned char* shared;
  int first_m, first_n, first, tiles, granule, x_granule;
  Copier<S::kN, S::kCodeBytes, S::kCodeStride> codes;
  Copier<S::kM, S::kXBytes, S::kXStride> rows;

  DEVICE StripeCopier(const MatrixInput<typename S::X>& x, const DeviceWeight& w,
                      unsigned char* shared, int first_m, int first_n, int first, int tiles,
                      int thread)
      : x(x),
        w(w),
        shared(shared),
        first_m(first_m),
        first_n(first_n),
        first(first),
        tiles(tiles),
        granule(ALIGNED ? 16 : min(w.granule, 4)),
        x_granule(ALIGNED ? 16 : min(x.granule, 4)),
        codes(w.codes + static_cast<int64_t>(first_n) * w.row_bytes + first * S::kCodeBytes,
              w.row_bytes, granule, thread),
        rows(x.x + first_m * x.x_stride + first * S::kColumns, x.x_stride * sizeof(typename S::X),
             x_granule, thread) {}

  DEVICE void copy(int tile) {
    if (tile < tiles) {
      unsigned char* to = shared + tile % S::kStages * S::kStage;
      const int bytes = w.row_bytes - (first + tile) * S::kCodeBytes;
      const int x_bytes =
          (x.width - (first + tile) * S::kColumns) * static_cast<int>(sizeof(typename S::X));
      copy_part(codes, to, w.n - first_n, bytes, granule);
      copy_part(rows, to + S::kN * S::kCodeStride, x.rows - first_m, x_bytes, x_granule);
    }
    cp_async_commit();
  }

 private:
  template <class C>
  DEVICE void copy_part(C& copier, unsigned char* to, int rows, int bytes, int granule) {
    if constexpr (ALIGNED)
      copier.template copy<16>(to, rows, bytes);
    else if (granule == 4)
      copier.template copy<4>(to, rows, bytes);
    else
      copier.template copy<1>(to, rows, bytes);
  }
};

// Scales and offsets of a lane's two rows of 16, as in memory.
struct ScaleBits {
  uint32_t scale[2], zero[2];
};

// `at`: the index of each row's first scale.
template <class S>
DEVICE void load_scales(const DeviceWeight& w, bool zeros, const int (&at)[S::kTiles][2],
                        int column, ScaleBits (&bits)[S::kTiles]) {
  const int group = w.group_of(column);
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bits[i].scale[r] = load_bits(w.scales, w.factors, at[i][r] + group);
      bits[i].zero[r] = zeros ? load_bits(w.zeros, w.factors, at[i][r] + group) : 0;
    }
}

// The left operands of UNIT steps from `step` on. `codes`: this lane's octet of step 0 in row g.
template <Form FORM, class S, int UNIT>
DEVICE void load_left(const unsigned char* codes, int step, const float (&scale)[S::kTiles][2],
                      const float (&zero)[S::kTiles][2],
                      uint32_t (&a)[UNIT][S::kTiles][S::kProducts][4]) {
#pragma unroll
  for (int s = 0; s < UNIT; ++s)
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
      uint32_t octets[2][S::kBits / 4];
      load_words(octets[0], codes + 16 * i * S::kCodeStride + (step + s) * 4 * S::kBits);
      load_words(octets[1], codes + (16 * i + 8) * S::kCodeStride + (step + s) * 4 * S::kBits);
      operands_of<FORM, S::kBits>(octets, scale[i], zero[i], a[s][i], typename S::X{});
    }
}

template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bfloat16> ? 0x3f803f80u : 0x3c003c00u;  // two

// sums[..][t] += the products of UNIT steps from `step` on with 8 rows of x. `x`: this lane's octet
// of step 0 in row g of them. x_sums, where they are needed: x times 1 instead of W.
template <class S, int UNIT, int N, class Sum>
DEVICE void multiply(const uint32_t (&a)[UNIT][S::kTiles][S::kProducts][4], const unsigned char* x,
                     int step, Sum (&sums)[S::kTiles][N][4], int t, bool want_x_sums,
                     float (&x_sums)[4]) {
  using T = typename S::X;
#pragma unroll
  for (int s = 0; s < UNIT; ++s) {
    uint32_t b[2 * S::kProducts];
    load_words(b, x + (step + s) * 32 * sizeof(T));
#pragma unroll
    for (int j = 0; j < S::kProducts; ++j) {
      const uint32_t columns[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) mma(sums[i][t], a[s][i][j], columns, T{});
      if constexpr (!S::kInteger)
        if (want_x_sums) mma(x_sums, {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>}, columns, T{});
    }
  }
}

// total += scale sums + zero x_sums, for the 8 rows of x from first_m + 8 t on. Scales and sums of
// int8 x are those of the run that contains column `from`: the sums are added where it begins.
template <class S, class Sum>
DEVICE void add_scaled(const MatrixInput<typename S::X>& x, const DeviceWeight& w, bool zeros,
                       int from, int first_m, int t, int c, const float (&scale)[S::kTiles][2],
                       const float (&zero)[S::kTiles][2], const Sum (&sums)[S::kTiles][1][4],
                       const float (&x_sums)[4], float (&total)[S::kTiles][S::kNT][4]) {
  [[maybe_unused]] Vector<float, 2> x_scale{{1, 1}};
  Vector<float, 2> x_sum{{x_sums[0], x_sums[1]}};  // of rows 2 c and 2 c + 1 of x
  bool offset = zeros;
  if constexpr (S::kInteger) {
    const int64_t at = w.run_of(from) * x.scale_stride + first_m + 8 * t + c * 2;
    x_scale = load(reinterpret_cast<const Vector<float, 2>*>(x.scale + at));
    offset = zeros && w.begins_run(from);
    if (offset) x_sum = load(reinterpret_cast<const Vector<float, 2>*>(x.sums + at));
  }
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float factor = scale[i][e / 2];
      if constexpr (S::kInteger) factor *= x_scale.at[e % 2] * (1.0f / kIntegerUnit<S::kBits>);
      total[i][t][e] += value_of(sums[i][0][e]) * factor;
      if (offset) total[i][t][e] += zero[i][e / 2] * x_sum.at[e % 2];
    }
}

// Stores a lane's totals to shared memory: (warps_k, m, n).
template <class S>
DEVICE void store_totals(const MatrixThread<S>& thread, const float (&total)[S::kTiles][S::kNT][4],
                         float* to) {
#pragma unroll
  for (int t = 0; t < S::kNT; ++t)
#pragma unroll
    for (int i = 0; i < 4 * S::kTiles; ++i)
      store(to + (thread.warp_k * S::kM + 8 * t + thread.c * 2 + i % 2) * S::kSumStride +
                thread.warp_n * 16 * S::kTiles + thread.g + i / 2 * 8,
            total[i / 4][t][i % 4]);
}

// Adds the totals of the warps_k. Writes y, or a part of it where the stripe is not a full row of
// tiles; parts are numbered from the stripe that begins this row.
template <class S>
DEVICE void write_output(const MatrixOutput& out, const float* totals, int rows, int n_of_w,
                         int n_tile, int k_tiles, bool full_row) {
  const int first_m = blockIdx.x * S::kM, first_n = n_tile * S::kN;
  const int64_t before = static_cast<int64_t>(blockIdx.y - n_tile * k_tiles / out.stripe) * rows;
  for (int i = threadIdx.x; i < S::kM * S::kN; i += kThreads) {
    const int m = i / S::kN, n = i % S::kN;
    if (first_m + m >= rows || first_n + n >= n_of_w) continue;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < S::kWarpsK; ++k) sum += load(totals + (k * S::kM + m) * S::kSumStride + n);
    const int64_t at = static_cast<int64_t>(first_m + m) * n_of_w + first_n + n;
    if (!full_row) {
      store(out.parts + before * n_of_w + at, sum);
    } else {
      if (out.bias) sum += load_float(out.bias, out.bias_dtype, first_n + n);
      store_float(out.y, out.dtype, at, sum);
    }
  }
}

// Multiplies `tiles` tiles of a row of tiles, from tile `first` on, and writes y or a part.
template <Form FORM, class S, bool ALIGNED>
DEVICE void multiply_stripe(const MatrixInput<typename S::X>& x, const DeviceWeight& w,
                            const MatrixOutput& out, unsigned char* shared, int n_tile, int first,
                            int tiles) {
  using Sum = std::conditional_t<S::kInteger, int, float>;
  constexpr bool kExact = FORM != kAny;
  [[maybe_unused]] constexpr Sum kZero = S::kInteger ? kIntegerZero : 0;
  const bool zeros =
      FORM == kOffsets || ((S::kInteger || FORM == kNarrow || FORM == kAny) && w.zeros);
  const MatrixThread<S> thread;
  const int first_m = blockIdx.x * S::kM, first_n = n_tile * S::kN;
  StripeCopier<S, ALIGNED> copier(x, w, shared, first_m, first_n, first, tiles, thread.number);
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) copier.copy(s);

  int scales_at[S::kTiles][2];  // of a row's first scale; rows beyond W have the last one's
#pragma unroll
  for (int i = 0; i < 2 * S::kTiles; ++i)
    scales_at[i / 2][i % 2] =
        min(first_n + thread.warp_n * 16 * S::kTiles + thread.g + 8 * i, w.n - 1) * w.groups;
  float total[S::kTiles][S::kNT][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int column = (first + tile) * S::kColumns + thread.warp_k * S::kRange;
    ScaleBits bits[S::kTiles];  // of the first step: loads issued here arrive before the barrier
    const auto read_scales = [&](int step) {
      load_scales<S>(w, zeros, scales_at, column + 32 * step + (kExact ? 0 : thread.c * 8), bits);
    };
    read_scales(0);
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // all copies have arrived, and all threads have read the stage to fill next
    copier.copy(tile + S::kStages - 1);
    const unsigned char* stage = shared + tile % S::kStages * S::kStage;
    const unsigned char* codes = stage +
                                 (thread.warp_n * 16 * S::kTiles + thread.g) * S::kCodeStride +
                                 thread.warp_k * (S::kRange * S::kBits / 8) + thread.c * S::kBits;
    const unsigned char* rows = stage + S::kN * S::kCodeStride + thread.g * S::kXStride +
                                (thread.warp_k * S::kRange + thread.c * 8) * sizeof(typename S::X);
    const auto multiply_steps = [&](int step, auto unit) {  // from `step` on, scaled at once
      constexpr int kUnit = decltype(unit)::value;
      float scale[S::kTiles][2], zero[S::kTiles][2];
#pragma unroll
      for (int i = 0; i < S::kTiles * 2; ++i) {
        scale[i / 2][i % 2] = float_of(bits[i / 2].scale[i % 2], w.factors);
        zero[i / 2][i % 2] = float_of(bits[i / 2].zero[i % 2], w.factors);
      }
      if (kUnit == 1 && step < S::kSteps - 1) read_scales(step + 1);
      uint32_t a[kUnit][S::kTiles][S::kProducts][4];
      load_left<FORM, S>(codes, step, scale, zero, a);
#pragma unroll
      for (int t = 0; t < S::kNT; ++t) {
        [[maybe_unused]] float x_sums[4] = {};  // 16-bit x: the sums of two rows of x, twice
        if constexpr (kExact) {
          Sum sums[S::kTiles][1][4];
#pragma unroll
          for (int i = 0; i < 4 * S::kTiles; ++i) sums[i / 4][0][i % 4] = kZero;
          multiply<S>(a, rows + t * 8 * S::kXStride, step, sums, 0, zeros, x_sums);
          add_scaled<S>(x, w, zeros, column + 32 * step, first_m, t, thread.c, scale, zero, sums,
                        x_sums, total);
        } else {
          multiply<S>(a, rows + t * 8 * S::kXStride, step, total, t, false, x_sums);
        }
      }
    };
    if constexpr (FORM == kScales || FORM == kOffsets) {
      multiply_steps(0, std::integral_constant<int, S::kSteps>{});
    } else {
#pragma unroll 1  // for registers
      for (int step = 0; step < S::kSteps; ++step)
        multiply_steps(step, std::integral_constant<int, 1>{});
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // from here on the stages' memory holds totals
  float* const totals = reinterpret_cast<float*>(shared);
  store_totals(thread, total, totals);
  __syncthreads();
  const int k_tiles = tiles_of<S>(w);
  write_output<S>(out, totals, x.rows, w.n, n_tile, k_tiles, tiles == k_tiles);
}

// Blocks per multiprocessor. Two leave 128 registers each; some forms with 32 rows would spill.
template <Form FORM, int BITS, class T, int NT>
constexpr int kBlocks =
    NT < 4 || (NT == 4 && FORM != kAny && (sizeof(T) == 2 || BITS == 4)) ? 2 : 1;

// ALIGNED: rows of codes and of x begin and end at multiples of 16 bytes. One variant serves all
// other operands.
template <Form FORM, int BITS, class T, int NT, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks<FORM, BITS, T, NT>)
    matrix_kernel(MatrixInput<T> x, DeviceWeight w, MatrixOutput out) {
  using S = MatrixShape<BITS, T, NT>;
  DYNAMIC_SHARED(shared);
  const int k_tiles = tiles_of<S>(w), n_tiles = (w.n + S::kN - 1) / S::kN;
  const int begin = blockIdx.y * out.stripe, end = min(begin + out.stripe, n_tiles * k_tiles);
  int n_tile = __shfl_sync(kAllLanes, begin / k_tiles, 0);
  for (int first = begin - n_tile * k_tiles; n_tile * k_tiles + first < end; ++n_tile, first = 0) {
    const int tiles = min(k_tiles - first, end - n_tile * k_tiles - first);
    multiply_stripe<FORM, S, ALIGNED>(x, w, out, shared, n_tile, first, tiles);
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
    const int64_t uncut_tiles = kNT < 8 && waves > 1 ? 0 : waves * tiles;
    const int64_t all = tiles * n_tiles, blocks = std::max<int64_t>(1, multiprocessors / m_tiles);
    int64_t stripe = std::max<int64_t>(ceil_div(all, blocks), 4);
    if (stripe < tiles) stripe = std::max<int64_t>(stripe, ceil_div(tiles * 64 * rows, k * bits));
    // add_parts takes about as long as 8 tiles (16384 weights each, 0.3 to 0.4 us)
    if (uncut_tiles - stripe <= 8) stripe = tiles;
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
    throw std::invalid_argument("group_size: expected a multiple of 32, got " +
                                std::to_string(group_size));
  if (stripe < 1)
    throw std::invalid_argument("stripe: expected at least 1, got " + std::to_string(stripe));
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
    const int64_t available = parts ? parts->size(0) : 0, needed = parts_of(tiles, stripe);
    if (needed > 1 && available < needed) check_size("parts", "matrices", needed, available);
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
