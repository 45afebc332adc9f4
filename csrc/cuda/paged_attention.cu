// out = softmax(scores) v for the newest S rows of each sequence on keys and values in pages: the
// decode step (Kwon et al. 2023; split keys: Dao et al. 2023, "Flash-Decoding"). K and V are read
// once from memory by 128-bit loads (int8: 64), q and the page table from L2. How the keys are
// divided: paged_attention.cuh.
//
// `paged_dot_kernel`: up to 2 rows per unit, or float32. A key's row is spread over 2^n lanes, 8
// elements each. A warp has several keys at once, and each group of lanes kUnroll keys in flight:
//
//     lanes  | key 0: q k, 8 columns a lane | key 1 ...  |    every group of lanes has a softmax
//     warps  0..7: the next keys                              of its own; merged at the end
//
// More rows of 16 bits: paged_attention_mma.cu. Not measured on a GPU.
#include "cuda/paged_attention.cuh"

namespace fastlm {
namespace paged {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxUnroll = 4;
constexpr int kMaxKeys = kMaxUnroll * kThreads;  // most keys of a block at once: one per lane
static_assert(kMaxKeys >= PAGED_TILE);
constexpr int kCombineThreads = 128;

// Eight elements of a row as in memory, in pieces of at most 16 bytes. Words, because nvcc would
// split a vector of bytes and reassemble its words.
template <class C>
struct Eight {
  static constexpr int kPieces = sizeof(C) == 4 ? 2 : 1, kWords = 2 * sizeof(C) / kPieces;
  Vector<uint32_t, kWords> piece[kPieces];
  DEVICE uint32_t word(int i) const { return piece[i / kWords].at[i % kWords]; }
};
template <class C>
DEVICE Eight<C> load_eight(const C* p) {
  Eight<C> result;
#pragma unroll
  for (int i = 0; i < Eight<C>::kPieces; ++i)
    result.piece[i] = load(reinterpret_cast<const Vector<uint32_t, Eight<C>::kWords>*>(p) + i);
  return result;
}
template <class C>
DEVICE void to_floats(const Eight<C>& x, float (&f)[8]) {
  if constexpr (std::is_same_v<C, int8_t>) {
    // 2^23 + 128 + x by moving bytes: a conversion takes four times as long
#pragma unroll
    for (int i = 0; i < 8; ++i)
      f[i] =
          __uint_as_float(__byte_perm(x.word(i / 4) ^ 0x80808080u, 0x4b000000u, 0x7440 + i % 4)) -
          8388736.0f;
  } else if constexpr (std::is_same_v<C, bfloat16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = __uint_as_float(x.word(i) << 16);
      f[2 * i + 1] = __uint_as_float(x.word(i) & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<C, float16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = x.word(i);
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
      f[2 * i] = pair.x;
      f[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = __uint_as_float(x.word(i));
  }
}

// 128 registers: 16 warps on a multiprocessor, in which each lane has 2 kUnroll loads in flight
template <int ROWS, class T, class C>
__global__ void __launch_bounds__(kThreads, 2)
    paged_dot_kernel(PagedProblem<T, C> p, int lanes_log2) {
  constexpr int kUnroll = sizeof(T) == 4 ? 2 : kMaxUnroll;
  DYNAMIC_SHARED(memory);
  SHARED(float2, sums, kWarps * ROWS);
  float* const outs = reinterpret_cast<float*>(memory);  // (kWarps, ROWS, dv)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lanes = 1 << lanes_log2, groups = 32 >> lanes_log2;
  const int column = (lane & (lanes - 1)) * 8, key_of_warp = lane >> lanes_log2;

  for_each_piece<kThreads>(p.work, p.record, [&](const Piece& piece) {
    const int kv_head = piece.kv_head;
    const float scale = scale_of(p, kv_head);
    // lanes beyond the row read its start: their q is zero, and their out is not stored
    const C* const k = p.k + kv_head * p.k_step.head + (column < p.d ? column : 0);
    const C* const v = p.v + kv_head * p.v_step.head + (column < p.dv ? column : 0);
    QueryRow row[ROWS];
    float q[ROWS][8] = {}, out[ROWS][8] = {}, top[ROWS], sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      row[r] = row_of<ROWS>(p, piece, r);
      top[r] = -INFINITY;
      sum[r] = 0;
      if (row[r].exists() && column < p.d)
        to_floats(load_eight(p.q + piece.b * p.q_step.outer + row[r].query * p.q_step.row +
                             row[r].head * p.q_step.head + column),
                  q[r]);
    }
    const auto key = [&](int from, int u) {
      return from + (u * kWarps + warp) * groups + key_of_warp;
    };
    const int last = piece.end - 1;  // lanes beyond read it again, and `score` masks it
    int page[kUnroll];
    const auto find_pages = [&](int from) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) page[u] = page_of(p, piece.b, min(key(from, u), last));
    };
    const int step = kUnroll * kWarps * groups;
    const KeyRange visible = visible_to_all(p, piece);
    if (piece.begin < piece.end) find_pages(piece.begin);
#pragma unroll 1  // registers do not hold twice as many keys
    for (int from = piece.begin; from < piece.end; from += step) {
      Eight<C> keys[kUnroll], values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const KeyAt at = key_at(p, page[u], min(key(from, u), last));
        keys[u] = load_eight(k + at.k);
        values[u] = load_eight(v + at.v);
      }
      find_pages(from + step);  // in flight together with the keys
      float s[ROWS][kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float x[8];
        to_floats(keys[u], x);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          s[r][u] = q[r][0] * x[0];
#pragma unroll
          for (int i = 1; i < 8; ++i) s[r][u] += q[r][i] * x[i];
        }
      }
      for (int l = lanes / 2; l; l /= 2)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) s[r][u] += __shfl_xor_sync(kAllLanes, s[r][u], l);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float higher = top[r];
        if (visible.has(from, step)) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) s[r][u] *= scale;
        } else {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u)
            s[r][u] = score(p, piece, row[r], key(from, u), s[r][u], scale);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) higher = fmaxf(higher, s[r][u]);
        const float zero = or_zero(higher), rescale = exp2_approximate(top[r] - zero);
        top[r] = higher;
        sum[r] *= rescale;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[r][i] *= rescale;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          s[r][u] = exp2_approximate(s[r][u] - zero);
          sum[r] += s[r][u];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float x[8];
        to_floats(values[u], x);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int i = 0; i < 8; ++i) out[r][i] += s[r][u] * x[i];
      }
    }
    // merge the groups of lanes of a warp, then the warps
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float highest = top[r];
      for (int l = lanes; l < 32; l *= 2)
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, l));
      const float rescale = exp2f(top[r] - or_zero(highest));
      sum[r] *= rescale;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[r][i] *= rescale;
      for (int l = lanes; l < 32; l *= 2) {
        sum[r] += __shfl_xor_sync(kAllLanes, sum[r], l);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[r][i] += __shfl_xor_sync(kAllLanes, out[r][i], l);
      }
      if (lane == 0) store(sums + warp * ROWS + r, float2{highest, sum[r]});
      if (lane < lanes && column < p.dv)
#pragma unroll
        for (int i = 0; i < 8; i += 4)
          store(reinterpret_cast<float4*>(outs + (warp * ROWS + r) * p.dv + column + i),
                float4{out[r][i], out[r][i + 1], out[r][i + 2], out[r][i + 3]});
    }
    __syncthreads();
    write_rows<kThreads, kWarps, ROWS>(p, piece, outs, p.dv, sums);
    __syncthreads();  // `outs` may be written again
  });
}

// block (i, r): row r of the unit that block i of the previous kernel began and other blocks ended.
// A warp adds every fourth slot; a lane adds 4 of its columns. `rows`: rows per slot.
template <class T, class C>
__global__ void __launch_bounds__(kCombineThreads)
    paged_combine_kernel(PagedProblem<T, C> p, int rows) {
  constexpr int kWarpsOf = kCombineThreads / 32;
  SHARED(float4, parts,
         kWarpsOf * PAGED_MAX_WIDTH /
             4);  // of each warp; float4: an array of float is not aligned to 16
  float* const part = reinterpret_cast<float*>(parts);
  const int first = blockIdx.x, r = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int4 unit = load(p.record + first);
  const int slots = unit.z;
  if (slots == 0) return;
  const int kv_head = unit.y / p.work.row_groups;
  const int row = unit.y % p.work.row_groups * rows + r;
  if (row >= p.rows) return;
  const int query = row / p.group, head = kv_head * p.group + row % p.group;
  const auto at = [&](int i) {
    return int64_t{i == 0 ? 2 * first + 1 : 2 * (first + i)} * rows + r;
  };
  float top = -INFINITY, sum = 0;
  for (int i = lane; i < slots; i += 32) top = fmaxf(top, load(p.part_sum + at(i)).x);
  top = max_of_warp(top);
  for (int i = lane; i < slots; i += 32) {
    const float2 partial = load(p.part_sum + at(i));
    sum += partial.y * exp2f(partial.x - or_zero(top));
  }
  const RowFinish last = finish(p, head, kv_head, top, sum_of_warp(sum));
  for (int c = lane * 4; c < p.dv; c += 128) {
    float4 x{0, 0, 0, 0};
#pragma unroll 4
    for (int i = warp; i < slots; i += kWarpsOf) {
      const float weight = exp2f(load(p.part_sum + at(i)).x - or_zero(top));
      const float4 y = load(reinterpret_cast<const float4*>(p.part + at(i) * p.dv + c));
      x.x += weight * y.x, x.y += weight * y.y, x.z += weight * y.z, x.w += weight * y.w;
    }
    store(reinterpret_cast<float4*>(part + warp * PAGED_MAX_WIDTH + c), x);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < p.dv; c += kCombineThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarpsOf; ++w) x += load(part + w * PAGED_MAX_WIDTH + c);
    store(p.out + ((int64_t{unit.x} * p.work.queries + query) * p.heads + head) * p.dv + c,
          from_float<T>(x * last.factor));
  }
  if (threadIdx.x == 0)
    store(p.lse + (int64_t{unit.x} * p.heads + head) * p.work.queries + query, last.lse);
}

template <class T, class C>
void start(PagedProblem<T, C>& p, int rows, int blocks, cudaStream_t stream) {
  if (rows >= 16) {
    if constexpr (!std::is_same_v<T, float>) start_mma(p, rows, blocks, stream);
  } else {
    int lanes_log2 = 0;
    while (8 << lanes_log2 < std::max(p.d, p.dv)) ++lanes_log2;
    const Launch config{"paged_attention", dim3(blocks), dim3(kThreads),
                        static_cast<size_t>(kWarps) * rows * p.dv * sizeof(float), stream};
    if (rows == 1)
      launch(config, paged_dot_kernel<1, T, C>, p, lanes_log2);
    else
      launch(config, paged_dot_kernel<PAGED_DOT_ROWS, T, C>, p, lanes_log2);
  }
  if (blocks > 1)  // a slot of 16 rows may have 4 of them
    launch({"paged_attention combine", dim3(blocks, std::min(rows, p.rows)), dim3(kCombineThreads),
            0, stream},
           paged_combine_kernel<T, C>, p, rows);
}

CacheStrides strides_of(const char* argument, const TensorView& t) {
  for (int i = 0; i < 2; ++i)
    if (t.size(i) > 1 && t.stride(i) != static_cast<int>(t.stride(i)))
      throw std::invalid_argument(std::string(argument) + ": expected strides below 2^31, got " +
                                  std::to_string(t.stride(i)));
  return {static_cast<int>(t.stride(0)), static_cast<int>(t.stride(1)), t.stride(2)};
}

}  // namespace
}  // namespace paged

int64_t paged_attention_workspace(int rows, int blocks, int dv) {
  return int64_t{2} * blocks * rows * (dv + 2) + int64_t{4} * blocks;
}

void paged_attention_forward(TensorView q, TensorView k, TensorView v, TensorView block_table,
                             TensorView seq_lens, OptionalTensor k_scale, OptionalTensor v_scale,
                             OptionalTensor sinks, OptionalTensor alibi_slopes, OptionalTensor bias,
                             bool causal, float scale, int64_t window, float softcap, int rows,
                             int blocks, int min_tiles, TensorView out, TensorView lse,
                             TensorView workspace, Stream stream) {
  const int64_t slots = int64_t{2} * blocks * rows;
  check_size("workspace", "floats", paged_attention_workspace(rows, blocks, v.size(3)),
             workspace.numel());
  const auto with_cache = [&](auto element, auto cached) {
    using T = decltype(element);
    using C = decltype(cached);
    paged::PagedProblem<T, C> p{};
    p.q = input<T>(q, "q");
    p.k = input<C>(k, "k_cache");
    p.v = input<C>(v, "v_cache");
    p.out = output<T>(out, "out");
    p.lse = output<float>(lse, "lse");
    p.part = output<float>(workspace, "workspace");
    p.part_sum = reinterpret_cast<float2*>(p.part + slots * v.size(3));
    p.record = reinterpret_cast<int4*>(p.part + slots * (v.size(3) + 2));
    p.table = input<int>(block_table, "block_table");
    p.k_scale = input<float>(k_scale, "k_scale");
    p.v_scale = input<float>(v_scale, "v_scale");
    p.sinks = input<float>(sinks, "sinks");
    p.alibi_slopes = input<float>(alibi_slopes, "alibi_slopes");
    p.bias = input<float>(bias, "bias");
    p.bias_keys = INT32_MAX;
    if (bias) {
      for (int i = 0; i < 4; ++i) p.bias_step[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
      if (bias->size(3) != 1) p.bias_keys = static_cast<int>(bias->size(3));
    }
    p.q_step = {q.stride(0), q.stride(1), q.stride(2)};
    p.k_step = paged::strides_of("k_cache", k);
    p.v_step = paged::strides_of("v_cache", v);
    p.table_row = block_table.stride(0);
    p.page_size = paged::divisor(static_cast<int>(k.size(1)));
    p.pages = static_cast<int>(k.size(0));
    p.heads = static_cast<int>(q.size(2));
    p.group = p.heads / static_cast<int>(k.size(2));
    p.rows = static_cast<int>(q.size(1)) * p.group;
    p.d = static_cast<int>(q.size(3));
    p.dv = static_cast<int>(v.size(3));
    p.scale = scale * paged::kLog2e;
    p.softcap = softcap * paged::kLog2e;
    p.softcap_inverse = softcap > 0 ? 1 / p.softcap : 0;
    p.plain = !p.softcap && !alibi_slopes && !bias;
    p.causal = causal || window > 0;
    p.work.seq_lens = input<int>(seq_lens, "seq_lens");
    p.work.batch = static_cast<int>(q.size(0));
    p.work.queries = static_cast<int>(q.size(1));
    p.work.window = static_cast<int>(std::min<int64_t>(window, 1 << 30));
    // kernels count to 2 kFurthest past the last key in 31 bits; an empty cache has no keys
    p.work.longest =
        static_cast<int>(k.size(0) == 0 ? 0
                                        : std::min<int64_t>(block_table.size(1) * k.size(1),
                                                            INT32_MAX - 2 * paged::kMaxKeys));
    p.work.row_groups = ceil_div(p.rows, rows);
    p.work.units = static_cast<int>(k.size(2)) * p.work.row_groups;
    p.work.min_tiles = min_tiles;
    paged::start(p, rows, blocks, reinterpret_cast<cudaStream_t>(stream));
  };
  with_device_float(q.dtype(), "q", [&](auto element) {
    if (k.dtype() == DType::i8)
      with_cache(element, int8_t{});
    else
      with_cache(element, element);
  });
}

}  // namespace fastlm
