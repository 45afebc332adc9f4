// Forward by blocks: Q_BLOCK queries of one head against KV_BLOCK keys at a time, running maximum
// and sum per row (online softmax), so that scores never leave the L2.
//
// All keys and values are packed once, shared by the query blocks and, with grouped heads, by the
// heads:
//   packed K  [key / VL][D / KP][VL][KP]            one panel per VL keys: columns of S = Q K^T
//   packed V  per KV_BLOCK keys: [d / VL][key / KP][VL][KP]   columns of O += P V
// Read per query block: Q once, packed K and V once from L2 or L3.

constexpr int64_t Q_BLOCK = 96;    // multiple of MR = 6 and of the 32 rows of an AMX block
constexpr int64_t KV_BLOCK = 256;  // scores 96 x 256 fp32: 96 KiB of L2; fewer O reloads than 128
constexpr float RESCALE = 5.5f;    // O is rescaled when a row's sum could grow by more than e^5.5

template <class E>
struct PackedShape {
  int64_t D, Dv;  // padded: K rows to K_STEP, V columns to VL
  explicit PackedShape(const AttentionShape& s) : D(padded_k<E>(s.D)), Dv(round_up(s.Dv, VL)) {}
  int64_t elements(int64_t rows) const { return rows * (D + Dv); }
};

// Keys j0 .. j0 + n of head g into the panels that begin at row j0 of `k`, `v`.
template <class E, class T, class C>
void pack_keys(const AttentionSequence<T, C>& p, const AttentionShape& s, int64_t g, int64_t j0,
               int64_t n, E* k, E* v, E* scratch) {
  if constexpr (!std::is_same_v<C, int8_t>) {
    if (!p.k.table) {
      pack_b<E>(p.k.base + g * p.k.head + j0 * p.k.row, 1, p.k.row, s.D, n, k);
      pack_b<E>(p.v.base + g * p.v.head + j0 * p.v.row, p.v.row, 1, n, s.Dv, v);
      return;
    }
  }
  gather_rows(p.k, g, j0, n, s.D, scratch);
  pack_b<E>(scratch, 1, s.D, s.D, n, k);
  gather_rows(p.v, g, j0, n, s.Dv, scratch);
  pack_b<E>(scratch, s.Dv, 1, n, s.Dv, v);
}

// The A operand of rows [i0, i0 + n): q in place where the core can read it, else packed.
template <class E, class T>
FASTLM_INLINE const E* as_operand(const T* rows, int64_t stride, int64_t n, int64_t D, E* scratch,
                                  int64_t* lda) {
  if constexpr (std::is_same_v<E, T>) {
    if (padded_k<E>(D) == D) {
      *lda = stride;
      return rows;
    }
  }
  *lda = padded_k<E>(D);
  pack_a<E>(rows, stride, 1, n, D, scratch);
  return scratch;
}

// Turns one row of a block of scores, s (n), into probabilities in P (padded with zeros to
// n_padded), and updates the running maximum m and sum l. Returns the factor that O's row has to be
// multiplied by before P V is added.
template <class E>
FASTLM_INLINE float softmax_row(float* s, int64_t first, int64_t end, int64_t n_padded, float c,
                                const float* factor, float* m, float* l, E* P) {
  const int64_t begin = first / VL * VL, stop = round_up(end, VL);
  for (int64_t j = begin; j < first; ++j) s[j] = -INFINITE;
  for (int64_t j = end; j < stop; ++j) s[j] = -INFINITE;
  vfloat top0 = load(s + begin), top1 = top0;
  int64_t j = begin;
  for (; j + 2 * VL <= stop; j += 2 * VL)
    top0 = vmax(top0, load(s + j)), top1 = vmax(top1, load(s + j + VL));
  if (j < stop) top0 = vmax(top0, load(s + j));
  const float top = hmax(vmax(top0, top1)) * c;
  float rescale = 1;
  if (top > *m + RESCALE || *m == -INFINITE) {
    rescale = *m == -INFINITE ? 0.f : std::exp2((*m - top) * LOG2E);
    *m = top, *l *= rescale;
  }
  const vfloat offset = splat(*m == -INFINITE ? 0.f : *m);
  vfloat sum{};
  if (begin) memset(P, 0, size_t(begin) * sizeof(E));
  if (factor) {
    for (j = begin; j < stop; j += VL) {
      const vfloat p = vexp2((load(s + j) * c - offset) * LOG2E);
      sum += p;
      store(P + j, p * load(factor + j));
    }
  } else {
    for (j = begin; j < stop; j += VL) {
      const vfloat p = vexp2((load(s + j) * c - offset) * LOG2E);
      sum += p;
      store(P + j, p);
    }
  }
  if (n_padded > stop) memset(P + stop, 0, size_t(n_padded - stop) * sizeof(E));
  *l += hsum(sum);
  return rescale;
}

template <class E, class T, class C>
struct ForwardBlock {
  const AttentionShape& s;
  const ScoreOptions& o;
  const PackedShape<E>& packed;
  const float *k_scale, *v_scale;
  E *scratch, *q, *P;
  float *scores, *O, *factor;

  static int64_t bytes(const AttentionShape& s) {
    return Buffer::size_of<E>(KV_BLOCK * std::max(s.D, s.Dv)) +
           Buffer::size_of<E>(Q_BLOCK * padded_k<E>(s.D)) + Buffer::size_of<E>(Q_BLOCK * KV_BLOCK) +
           Buffer::size_of<float>(Q_BLOCK * KV_BLOCK) +
           Buffer::size_of<float>(Q_BLOCK * round_up(s.Dv, VL)) + Buffer::size_of<float>(KV_BLOCK);
  }
  ForwardBlock(const AttentionShape& s, const ScoreOptions& o, const PackedShape<E>& packed,
               const float* k_scale, const float* v_scale, Buffer& memory)
      : s(s), o(o), packed(packed), k_scale(k_scale), v_scale(v_scale) {
    scratch = memory.take<E>(KV_BLOCK * std::max(s.D, s.Dv));
    q = memory.take<E>(Q_BLOCK * padded_k<E>(s.D));
    P = memory.take<E>(Q_BLOCK * KV_BLOCK);
    scores = memory.take<float>(Q_BLOCK * KV_BLOCK);
    O = memory.take<float>(Q_BLOCK * packed.Dv);
    factor = memory.take<float>(KV_BLOCK);
  }

  // Queries i0 .. i0 + rows of head h; k, v: the packed keys of its sequence and key head.
  void run(const AttentionSequence<T, C>& p, int64_t b, int64_t h, int64_t i0, int64_t rows,
           const E* k, const E* v, T* out, float* lse) {
    int64_t lda;
    const E* a = as_operand(p.q + h * s.q.head + i0 * s.q.row, s.q.row, rows, s.D, q, &lda);
    const int64_t g = h / (s.H / s.Hkv);
    const float scale = o.scale * (k_scale ? k_scale[g] : 1.f);
    const bool plain = o.plain() && scale > 0;
    const float c = plain ? scale : 1.f;
    float m[Q_BLOCK], l[Q_BLOCK];
    for (int64_t r = 0; r < rows; ++r) {
      m[r] = o.sinks ? o.sinks[h] : -INFINITE;
      l[r] = m[r] == -INFINITE ? 0.f : 1.f;
    }
    const int64_t begin = s.span(i0, p.queries, p.keys).first / KV_BLOCK * KV_BLOCK,
                  end = s.span(i0 + rows - 1, p.queries, p.keys).end;
    if (begin >= end) memset(O, 0, size_t(rows * packed.Dv) * sizeof(float));
    for (int64_t j0 = begin; j0 < end; j0 += KV_BLOCK) {
      const int64_t n = std::min(KV_BLOCK, end - j0), in_block = std::min(KV_BLOCK, p.keys - j0),
                    n_padded = padded_k<E>(n);
      gemm<E>(rows, round_up(n, VL), s.D, a, lda, k + j0 * packed.D, scores, KV_BLOCK, false);
      for (int64_t r = 0; r < rows; ++r) {
        const KeySpan see = s.span(i0 + r, p.queries, p.keys);
        const int64_t first = std::max<int64_t>(see.first - j0, 0),
                      stop = std::min(see.end - j0, n);
        E* row = P + r * KV_BLOCK;
        if (first >= stop) {
          memset(row, 0, size_t(n_padded) * sizeof(E));
          continue;
        }
        float* x = scores + r * KV_BLOCK;
        if (!plain)
          finish_scores(o, scale, b, h, i0 + r, i0 + r + p.keys - p.queries, j0, n, x, nullptr);
        if (o.dropout) dropout_row(o, b, h, i0 + r, j0, n, factor);
        const float rescale = softmax_row(x, first, stop, n_padded, c, o.dropout ? factor : nullptr,
                                          m + r, l + r, row);
        if (rescale != 1 && j0 > begin)
          for (int64_t d = 0; d < packed.Dv; d += VL)
            store(O + r * packed.Dv + d, load(O + r * packed.Dv + d) * rescale);
      }
      gemm<E>(rows, packed.Dv, n, P, KV_BLOCK, v + j0 * packed.Dv, O, packed.Dv, j0 > begin,
              in_block);
    }
    for (int64_t r = 0; r < rows; ++r) {
      write_row(O + r * packed.Dv, l[r], v_scale ? v_scale[g] : 1.f, s.Dv,
                out + s.out.at(b, h, p.q0 + i0 + r));
      lse[s.lse.at(b, h, p.q0 + i0 + r)] =
          l[r] > 0 || l[r] != l[r] ? m[r] + std::log(l[r]) : -INFINITE;
    }
  }

  static void write_row(const float* row, float l, float scale, int64_t Dv, T* out) {
    const float inverse = l == 0 ? 0.f : scale / l;
    for (int64_t d = 0; d < Dv; d += VL) {
      const vfloat x = load(row + d) * inverse;
      if (Dv - d >= VL)
        store(out + d, x);
      else
        store(out + d, x, int(Dv - d));
    }
  }
};

// Bytes of forward_by_blocks' workspace: the packed keys, then each thread's arrays. The keys count
// as float32 also where E is half of that: with a smaller block glibc's trim threshold stays low,
// and memory freed after a call was returned to Linux every time (713 page faults, +22 % of a
// prefill).
template <class T, class C>
int64_t bytes_by_blocks(const AttentionShape& s, const SequenceLengths& lengths) {
  using E = Elem<T>;
  const int64_t packed = PackedShape<E>(s).elements(lengths.all_packed) * s.Hkv;
  return round_up(packed * int64_t(sizeof(float)), 64) +
         omp_get_max_threads() * ForwardBlock<E, T, C>::bytes(s);
}

template <class T, class C>
void forward_by_blocks(const AttentionShape& s, const ScoreOptions& o,
                       const AttentionSequence<T, C>* sequences, const SequenceLengths& lengths,
                       const float* k_scale, const float* v_scale, T* out, float* lse,
                       Workspace workspace) {
  using E = Elem<T>;
  const PackedShape<E> packed(s);
  E* K = workspace.take<E>(packed.elements(lengths.all_packed) * s.Hkv);
  E* V = K + lengths.all_packed * s.Hkv * packed.D;
  workspace.divide(ForwardBlock<E, T, C>::bytes(s));
  const int64_t q_blocks = (lengths.max_q + Q_BLOCK - 1) / Q_BLOCK,
                k_blocks = (lengths.max_k + KV_BLOCK - 1) / KV_BLOCK, G = s.H / s.Hkv;
  // the rows of key head g of sequence b begin at packed(b) * Hkv + g * rows(b)
  const auto start = [&](const AttentionSequence<T, C>& p, int64_t g) {
    return p.packed * s.Hkv + g * round_up(p.keys, ROW_PAD);
  };
#pragma omp parallel num_threads(workspace.threads)
  {
    Buffer memory(workspace.thread_part());
    ForwardBlock<E, T, C> block(s, o, packed, k_scale, v_scale, memory);
    TileScope tiles;
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t g = 0; g < s.Hkv; ++g)
        for (int64_t kb = 0; kb < k_blocks; ++kb) {
          const AttentionSequence<T, C>& p = sequences[b];
          const int64_t j0 = kb * KV_BLOCK, n = std::min(KV_BLOCK, p.keys - j0);
          if (n > 0)
            pack_keys<E>(p, s, g, j0, n, K + (start(p, g) + j0) * packed.D,
                         V + (start(p, g) + j0) * packed.Dv, block.scratch);
        }
    // the last query block sees most keys under a causal mask: largest tasks first
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t h = 0; h < s.H; ++h)
        for (int64_t back = 0; back < q_blocks; ++back) {
          const AttentionSequence<T, C>& p = sequences[b];
          const int64_t i0 = (q_blocks - 1 - back) * Q_BLOCK,
                        rows = std::min(Q_BLOCK, p.queries - i0);
          const int64_t at = start(p, h / G);
          if (rows > 0)
            block.run(p, b, h, i0, rows, K + at * packed.D, V + at * packed.Dv, out, lse);
        }
  }
}
