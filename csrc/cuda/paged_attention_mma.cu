// Units of paged_attention with 3 to 64 rows of 16 bits, by m16n8k16. More rows are several units;
// all but the first find K and V in L2. Tiles of 64 keys are copied to shared memory; cp.async
// fetches the next tile while this one is computed. q stays in shared memory. WM warps share the
// rows, 16 each; the other warps process other keys of the tile:
//
//     WM = 1:  rows 0-15    keys 0-15 | 16-31 | 32-47 | 48-63     a warp each, merged at the end
//     WM = 4:  rows 0-15, 16-31, 32-47, 48-63    keys 0-63 each
//
// A block takes the pieces of its units one after the other, a tile of K and V at a time:
//
//     find, copy    offsets of the rows of the tile after next; cp.async of the next tile
//     multiply_qk   scores of this tile's keys: q k
//     mask, soften  scale, options, mask; online softmax: probabilities, factors that rescale sums
//     multiply_pv   out += probabilities v
//     store, write  out, largest scores and sums of the warps -> shared memory -> merged
//
// Indices:
//
//     r         row of the unit, of ROWS = 16 WM; a warp has 16 from 16 wm on
//     j         key of the sequence; a warp has KEYS = 64 / WK of a tile, from first_key on
//     at, c     column of q and k (D), of v and out (Dv)
//     n         key of the warp, in multiply_qk and multiply_pv; elsewhere 8 keys or 8 columns
//     h, i      row g + 8 h of a warp's 16; register or element of a fragment: h = i / 2 of four
//     g, l      lane / 4, lane % 4
//
// Which elements a lane 4 g + l holds in m16n8k16 (A row by row, B column by column):
//
//     A       k: 2l, 2l+1   2l+8, 2l+9      B     k: 2l, 2l+1   2l+8, 2l+9      D      n: 2l  2l+1
//       m: g        a0          a2            n: g       b0          b1           m: g     d0   d1
//       m: g+8      a1          a3                                                m: g+8   d2   d3
//
//     q k^T   A = q (rows, columns of D), B = k (keys), D = scores (rows, 8 keys)
//     p v     A = p (rows, 16 keys), B = v (columns of Dv), D = out (rows, 8 columns)
//
// Scores and probabilities stay in registers: D of two times 8 keys is A of 16, a0 = (d0, d1) and
// a1 = (d2, d3) of the first, a2 and a3 of the second. An int8 cache is copied unchanged and
// widened between shared memory and the matrix instruction, where a register holds 4 neighbours of
// a row:
//
//     k   elements 4 l .. 4 l + 3 of 16 become slots 2 l, 2 l + 1, 2 l + 8, 2 l + 9 of the sum:
//         shared memory holds q in that order
//     v   a transposed pair of keys has columns 2 n and 2 n + 1: even and odd columns are separate
//         tiles
//
// Row strides in shared memory are an odd number of 16-byte units, so that ldmatrix has no bank
// conflict. (By the emulator's counts. With an int8 cache, q and the results of a unit take two
// passes instead of one, once each; so do copies of rows that are not 2^n times 128 bytes.) K and V
// are read in full sectors. Not measured on a GPU.
#include "cuda/paged_attention.cuh"

namespace fastlm::paged {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct TileSizes {
  int d_pad, dv_pad;                // columns, with zeros beyond D and Dv
  int q_pitch, k_pitch, v_pitch;    // bytes from row to row
  int k_bytes, v_bytes, out_pitch;  // of a tile; floats from row to row
};

TileSizes sizes_of(int d, int dv, int bytes) {
  const auto pitch = [](int columns, int each) { return (columns * each / 16 | 1) * 16; };
  TileSizes s;
  s.d_pad = static_cast<int>(round_up(d, 16));
  s.dv_pad =
      static_cast<int>(round_up(dv, bytes == 1 ? 32 : 16));  // what ldmatrix_x4_transposed covers
  s.q_pitch = pitch(s.d_pad, 2);
  s.k_pitch = pitch(s.d_pad, bytes);
  s.v_pitch = pitch(s.dv_pad, bytes);
  s.k_bytes = PAGED_TILE * s.k_pitch;
  s.v_bytes = PAGED_TILE * s.v_pitch;
  s.out_pitch = s.dv_pad + 8;
  return s;
}

size_t shared_bytes(const TileSizes& size, int rows) {
  const size_t tiles = 2 * (size.k_bytes + size.v_bytes);
  const size_t outs = PAGED_TILE * size.out_pitch * sizeof(float);  // WK * 16 WM rows
  return rows * size.q_pitch + std::max(tiles, outs);
}

template <class T>
DEVICE uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Two of four int8 as two of T, exactly. Selects name the bytes to take from x and from a constant.
constexpr uint32_t kFirstTwo = 0x4140, kLastTwo = 0x4342, kEven = 0x4240, kOdd = 0x4341;
template <class T>
DEVICE uint32_t widen(uint32_t bytes, uint32_t select) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // 128 + the lower seven bits, minus 128, or minus 256 where the eighth bit is set
    const uint32_t x = __byte_perm(bytes, 0x43434343u, select);
    const uint32_t low = x & 0xff7fff7fu, less = x & 0xff80ff80u;
    const auto y = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low),
                           reinterpret_cast<const __nv_bfloat162&>(less));
    return reinterpret_cast<const uint32_t&>(y);
  } else {
    // 1024 + 128 + x; the sign flip is done once for both pairs of a word
    const uint32_t x = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, select), less = 0x64806480u;
    const auto y =
        __hsub2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(less));
    return reinterpret_cast<const uint32_t&>(y);
  }
}

// q of the unit's rows, zeros for rows and columns that do not exist
template <int ROWS, class T, class C>
DEVICE void load_q(const PagedProblem<T, C>& p, const TileSizes& size, const Piece& piece,
                   unsigned char* to) {
  using V = Vector<T, 8>;
  const int columns = size.d_pad / 8;
  for (int i = threadIdx.x; i < ROWS * columns; i += kThreads) {
    const int r = i / columns, column = i % columns * 8;
    const QueryRow row = row_of<ROWS>(p, piece, r);
    V x{};
    if (row.exists() && column < p.d)
      x = load(reinterpret_cast<const V*>(p.q + piece.b * p.q_step.outer +
                                          row.query * p.q_step.row + row.head * p.q_step.head +
                                          column));
    T* const at = reinterpret_cast<T*>(to + r * size.q_pitch);
    if constexpr (sizeof(C) == 1) {
      const int slot = column / 16 * 16 + column % 16 / 2;
      using Half = Vector<T, 4>;
      store(reinterpret_cast<Half*>(at + slot), Half{x.at[0], x.at[1], x.at[4], x.at[5]});
      store(reinterpret_cast<Half*>(at + slot + 8), Half{x.at[2], x.at[3], x.at[6], x.at[7]});
    } else {
      store(reinterpret_cast<V*>(at + column), x);
    }
  }
}

// Copies the existing `rows` of a tile, LANES threads per row. Zeros after the last row and after
// `width`; their threads still pass a valid address of the cache.
template <int LANES, class C>
DEVICE void copy_rows(unsigned char* to, int pitch, const C* from, const int64_t* at, int rows,
                      int width, int padded) {
  const int column = threadIdx.x % LANES * (16 / sizeof(C)), first = threadIdx.x / LANES;
  if (column >= padded) return;
  if (column < width)
    from += column;
  else
    rows = 0;
  to += first * pitch + column * sizeof(C);
  constexpr int kTogether = kThreads / LANES;
#pragma unroll 4
  for (int row = 0; row < PAGED_TILE; row += kTogether)
    cp_async<16>(to + row * pitch, from + load(at + first + row), first + row < rows ? 16 : 0);
}

// K and V of a piece, and two stages of tiles in shared memory: tile i has stage i % 2.
template <class C>
struct KvStages {
  const C *k, *v;                    // the first key of the cache, of the piece's head
  int64_t *k_at, *v_at;              // (2, PAGED_TILE): offsets of a tile's keys
  unsigned char *k_tiles, *v_tiles;  // (2, PAGED_TILE, k_pitch or v_pitch)
};

// Stores the offsets of the keys of tile `tile`, a thread per key; zeros for keys past the last.
template <class T, class C>
DEVICE void find_keys(const PagedProblem<T, C>& p, const Piece& piece, int tile, int count,
                      const KvStages<C>& kv) {
  if (threadIdx.x >= PAGED_TILE || tile >= count) return;
  const int j = piece.begin + tile * PAGED_TILE + threadIdx.x;
  KeyAt at{0, 0};
  if (j < piece.end) at = key_at(p, page_of(p, piece.b, j), j);
  store(kv.k_at + tile % 2 * PAGED_TILE + threadIdx.x, at.k);
  store(kv.v_at + tile % 2 * PAGED_TILE + threadIdx.x, at.v);
}

// Starts the copy of tile `tile` to its stage, LANES threads per row.
template <int LANES, class T, class C>
DEVICE void copy_tile(const PagedProblem<T, C>& p, const TileSizes& size, const Piece& piece,
                      int tile, int count, const KvStages<C>& kv) {
  if (tile < count) {
    const int stage = tile % 2, rows = piece.end - piece.begin - tile * PAGED_TILE;
    copy_rows<LANES>(kv.k_tiles + stage * size.k_bytes, size.k_pitch, kv.k,
                     kv.k_at + stage * PAGED_TILE, rows, p.d, size.d_pad);
    copy_rows<LANES>(kv.v_tiles + stage * size.v_bytes, size.v_pitch, kv.v,
                     kv.v_at + stage * PAGED_TILE, rows, p.dv, size.dv_pad);
  }
  cp_async_commit();
}

// s (16 rows, KEYS) += q k^T. q: the tile; the warp has 16 rows of it from first_row on. k: the
// warp's first key.
template <int KEYS, class T, class C>
DEVICE void multiply_qk(const TileSizes& size, const unsigned char* q, int first_row,
                        const unsigned char* k, float (&s)[KEYS / 8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int at = 0; at < size.d_pad; at += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, q + (first_row + lane % 16) * size.q_pitch + (at + lane / 16 * 8) * 2);
#pragma unroll
    for (int n = 0; n < KEYS; n += 16) {
      uint32_t b[2][2];  // of keys n to n + 7, and of the 8 after those
      if constexpr (sizeof(C) == 1) {
        uint32_t x[2];
        ldmatrix_x2(x, k + (n + lane % 16) * size.k_pitch + at);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          b[i][0] = widen<T>(x[i], kFirstTwo);
          b[i][1] = widen<T>(x[i], kLastTwo);
        }
      } else {
        uint32_t x[4];
        ldmatrix_x4(
            x, k + (n + lane % 8 + lane / 16 * 8) * size.k_pitch + (at + lane / 8 % 2 * 8) * 2);
        b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
      }
      mma(s[n / 8], a, b[0], T{});
      mma(s[n / 8 + 1], a, b[1], T{});
    }
  }
}

// Products q k -> scores, in units of log2(e). `from`: the tile's first key. Where all rows see all
// keys of the tile, only the scale is applied.
template <int KEYS, class T, class C>
DEVICE void mask(const PagedProblem<T, C>& p, const Piece& piece, const QueryRow (&row)[2],
                 const KeyRange& visible, int from, int first_key, float scale,
                 float (&s)[KEYS / 8][4]) {
  if (visible.has(from, PAGED_TILE)) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= scale;
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = score(p, piece, row[i / 2], from + first_key + n * 8 + lane % 4 * 2 + i % 2,
                        s[n][i], scale);
  }
}

// Scores -> probabilities relative to `top`, the largest score so far of a row, which is raised;
// adds them to a lane's share of `sum`, and rescales that. rescale: the factor for out.
template <int KEYS>
DEVICE void soften(float (&s)[KEYS / 8][4], float (&top)[2], float (&sum)[2], float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float higher = top[h];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) higher = fmaxf(higher, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, 2));
    const float zero = or_zero(higher);
    rescale[h] = exp2_approximate(top[h] - zero);
    top[h] = higher;
    sum[h] *= rescale[h];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[n][2 * h + i];
        x = exp2_approximate(x - zero);
        sum[h] += x;
      }
  }
}

// out (16 rows, WIDTH) += s v. v: the warp's first key in shared memory.
template <int KEYS, int WIDTH, class T, class C>
DEVICE void multiply_pv(const TileSizes& size, const float (&s)[KEYS / 8][4],
                        const unsigned char* v, float (&out)[WIDTH / 8][4]) {
  constexpr int kStep = sizeof(C) == 1 ? 32 : 16;  // columns of an ldmatrix
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < KEYS; n += 16) {
    const float (&left)[4] = s[n / 8], (&right)[4] = s[n / 8 + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
    const unsigned char* const at = v + (n + lane % 16) * size.v_pitch + lane / 16 * 16;
#pragma unroll
    for (int c = 0; c < WIDTH; c += kStep) {
      if (c >= size.dv_pad) break;
      uint32_t x[4];
      ldmatrix_x4_transposed(x, at + c * sizeof(C));
      if constexpr (sizeof(C) == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t select = i % 2 ? kOdd : kEven;
          const uint32_t b[2] = {widen<T>(x[i / 2 * 2], select),
                                 widen<T>(x[i / 2 * 2 + 1], select)};
          mma(out[c / 8 + i], a, b, T{});
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t b[2] = {x[2 * i], x[2 * i + 1]};
          mma(out[c / 8 + i], a, b, T{});
        }
      }
    }
  }
}

// Stores the results of a warp's 16 rows, from row `first` on, to shared memory: `sums` (largest
// score, sum) and `outs`, rows of size.out_pitch.
template <int WIDTH, class C>
DEVICE void store_results(const TileSizes& size, int first, const float (&out)[WIDTH / 8][4],
                          const float (&top)[2], float (&sum)[2], float* outs, float2* sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
    sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
    const int r = first + h * 8 + lane / 4;
    if (lane % 4 == 0) store(sums + r, float2{top[h], sum[h]});
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      if (n * 8 >= size.dv_pad) break;
      const float (&x)[4] = out[n], (&y)[4] = out[n + 1];
      float* const at = outs + r * size.out_pitch + n * 8;
      if constexpr (sizeof(C) == 1) {  // even columns in x, odd ones in y
        store(reinterpret_cast<float4*>(at + lane % 4 * 4),
              float4{x[2 * h], y[2 * h], x[2 * h + 1], y[2 * h + 1]});
      } else {
        store(reinterpret_cast<float2*>(at + lane % 4 * 2), float2{x[2 * h], x[2 * h + 1]});
        store(reinterpret_cast<float2*>(at + 8 + lane % 4 * 2), float2{y[2 * h], y[2 * h + 1]});
      }
    }
  }
}

template <int WM, int WIDTH, class T, class C>
__global__ void __launch_bounds__(kThreads, 2)
    paged_mma_kernel(PagedProblem<T, C> p, TileSizes size) {
  constexpr int WK = kWarps / WM, kRows = 16 * WM, kKeys = PAGED_TILE / WK;  // of a warp
  constexpr int kLanes = WIDTH * sizeof(C) / 16;                             // that copy a row
  DYNAMIC_SHARED(memory);
  SHARED(int64_t, k_at, 2 * PAGED_TILE);  // offsets of the rows of this tile and the next
  SHARED(int64_t, v_at, 2 * PAGED_TILE);
  SHARED(float2, sums, WK * kRows);
  unsigned char* const q_tile = memory;
  unsigned char* const k_tiles = memory + kRows * size.q_pitch;  // two stages, then those of v
  unsigned char* const v_tiles = k_tiles + 2 * size.k_bytes;
  float* const outs = reinterpret_cast<float*>(k_tiles);  // (WK, kRows, out_pitch), at the end
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int wm = warp % WM, first_key = warp / WM * kKeys;

  for_each_piece<kThreads>(p.work, p.record, [&](const Piece& piece) {
    const float scale = scale_of(p, piece.kv_head);
    const int count = (piece.end - piece.begin + PAGED_TILE - 1) / PAGED_TILE;
    const KvStages<C> kv{p.k + piece.kv_head * p.k_step.head,
                         p.v + piece.kv_head * p.v_step.head,
                         k_at,
                         v_at,
                         k_tiles,
                         v_tiles};
    find_keys(p, piece, 0, count, kv);
    find_keys(p, piece, 1, count, kv);
    load_q<kRows>(p, size, piece, q_tile);
    __syncthreads();
    copy_tile<kLanes>(p, size, piece, 0, count, kv);

    QueryRow row[2];  // this lane's rows: lane / 4, and 8 below
#pragma unroll
    for (int h = 0; h < 2; ++h) row[h] = row_of<kRows>(p, piece, wm * 16 + h * 8 + lane / 4);
    float out[WIDTH / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    const KeyRange visible = visible_to_all(p, piece);
    for (int tile = 0; tile < count; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // this tile has arrived, and all warps have read the one before
      copy_tile<kLanes>(p, size, piece, tile + 1, count, kv);
      find_keys(p, piece, tile + 2, count, kv);
      const unsigned char* const k = k_tiles + tile % 2 * size.k_bytes + first_key * size.k_pitch;
      float s[kKeys / 8][4] = {}, rescale[2];
      multiply_qk<kKeys, T, C>(size, q_tile, wm * 16, k, s);
      mask<kKeys>(p, piece, row, visible, piece.begin + tile * PAGED_TILE, first_key, scale, s);
      soften<kKeys>(s, top, sum, rescale);
      // after a few tiles a higher score is rare
      if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f))
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i / 2];
      // computed here, not next to k: sm_100 has no registers left to hold it (WIDTH 256)
      const unsigned char* const v = v_tiles + tile % 2 * size.v_bytes + first_key * size.v_pitch;
      multiply_pv<kKeys, WIDTH, T, C>(size, s, v, out);
    }

    cp_async_wait<0>();
    __syncthreads();  // `outs` overwrites the tiles
    store_results<WIDTH, C>(size, warp / WM * kRows + wm * 16, out, top, sum, outs, sums);
    __syncthreads();
    // the next piece writes there after its own first barrier
    write_rows<kThreads, WK, kRows>(p, piece, outs, size.out_pitch, sums);
  });
}

template <int WM, class T, class C>
void start(const PagedProblem<T, C>& p, int blocks, cudaStream_t stream) {
  const TileSizes size = sizes_of(p.d, p.dv, sizeof(C));
  const Launch config{"paged_attention", dim3(blocks), dim3(kThreads), shared_bytes(size, 16 * WM),
                      stream};
  const int width = std::max(size.d_pad, size.dv_pad);
  if (width <= 64)
    launch(config, paged_mma_kernel<WM, 64, T, C>, p, size);
  else if (width <= 128)
    launch(config, paged_mma_kernel<WM, 128, T, C>, p, size);
  else
    launch(config, paged_mma_kernel<WM, 256, T, C>, p, size);
}

}  // namespace

template <class T, class C>
void start_mma(const PagedProblem<T, C>& p, int rows, int blocks, cudaStream_t stream) {
  if (rows == 16)
    start<1>(p, blocks, stream);
  else
    start<PAGED_MMA_ROWS / 16>(p, blocks, stream);
}
template void start_mma(const PagedProblem<bfloat16, bfloat16>&, int, int, cudaStream_t);
template void start_mma(const PagedProblem<bfloat16, int8_t>&, int, int, cudaStream_t);
template void start_mma(const PagedProblem<float16, float16>&, int, int, cudaStream_t);
template void start_mma(const PagedProblem<float16, int8_t>&, int, int, cudaStream_t);

}  // namespace fastlm::paged

namespace fastlm {

int64_t paged_attention_shared(int rows, int d, int dv, int bytes) {
  return paged::shared_bytes(paged::sizes_of(d, dv, bytes), rows) + (3 << 10);  // 3 KiB: static
}

}  // namespace fastlm
