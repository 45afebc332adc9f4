// Gradients. With P = exp(s - lse), dP = dO V^T, delta = sum(dO O) - dlse per row:
//
//   dV = P^T dO        dS = P (dP - delta)        dQ = scale dS K        dK = scale dS^T Q
//
// A task is one key head of one sequence, or one SPAN of its keys where heads alone give too few
// tasks. It processes its query heads in order, so every sum has one fixed order. Each block of
// keys and queries needs five products; scores and P stay in the L2:
//
//   S  (q, k) = Q . K^T         A = Q in place             B = packed K^T
//   dP (q, k) = dO . V^T        A = dO in place            B = packed V^T
//   dV^T (Dv, k) += dO^T . P    A = dO^T                   B = P, packed as it is computed
//   dK^T (D, k)  += Q^T . dS    A = Q^T                    B = dS, packed as it is computed
//   dQ (q, D)    += dS . K      A = dS                     B = packed K
//
// Rejected: dK = dS^T Q with dS as A, which needs a transposition of dS in the inner loop.

constexpr int64_t BQ = 128;       // queries a block: k of the dK and dV products
constexpr int64_t BK = 128;       // keys a block: two fp32 tiles of 64 KiB and P, dS in the L2
constexpr int64_t SPAN = 512;     // keys per task when there are fewer than MIN_TASKS heads
constexpr int64_t MIN_TASKS = 8;  // key heads x sequences that keep the cores of one socket busy

FASTLM_INLINE int64_t spans_of(const AttentionShape& s, const SequenceLengths& lengths) {
  return s.B * s.Hkv >= MIN_TASKS ? 1 : std::max<int64_t>(1, (lengths.max_k + SPAN - 1) / SPAN);
}

// Rows are computed one by one, in float32 on the stack, where packing costs more than the products
// (one token: 5 us of packing, 0.3 of products).
constexpr int64_t FEW = 8;             // queries and keys
constexpr int64_t FEW_WIDE = 256;      // D and Dv
constexpr int64_t FEW_WORK = 1 << 18;  // products; more are worth waking all threads

FASTLM_INLINE bool are_few(const AttentionShape& s, const SequenceLengths& lengths) {
  const int64_t max_q = lengths.max_q, max_k = lengths.max_k;
  return s.B <= FEW_SEQUENCES && max_q <= FEW && max_k <= FEW && s.D <= FEW_WIDE &&
         s.Dv <= FEW_WIDE && s.B * s.H * max_q * max_k * (s.D + s.Dv) <= FEW_WORK;
}

struct GradientStrides {
  HeadStrides dq, dk, dv, dout, dlse;
  const float* dlse_p;  // (B, H, S) or (H, total_q), or null
  float* dsinks;        // (B, H), summed over B by the caller, or null
};

// In place, for row i: scores s become P after dropout, dP becomes dS (the gradient of the scaled
// scores; of the biased ones when `for_bias`).
template <class T, class C>
inline void backward_row(const AttentionShape& s, const ScoreOptions& o,
                         const AttentionSequence<T, C>& p, int64_t b, int64_t h, int64_t i,
                         int64_t j0, int64_t n, float lse, float delta, bool for_bias, float* x,
                         float* dp, float* factor, float* slope) {
  const KeySpan see = s.span(i, p.queries, p.keys);
  const int64_t stop = round_up(n, VL), first = std::clamp<int64_t>(see.first - j0, 0, stop),
                end = std::clamp<int64_t>(see.end - j0, 0, n);
  const bool plain = o.plain();
  if (!plain)
    finish_scores(o, o.scale, b, h, i, i + p.keys - p.queries, j0, n, x,
                  o.softcap > 0 && !for_bias ? slope : nullptr);
  for (int64_t j = 0; j < first; ++j) x[j] = -INFINITE;
  for (int64_t j = end; j < stop; ++j) x[j] = -INFINITE;
  const float c = plain ? o.scale : 1.f;
  const float offset = lse == -INFINITE ? INFINITE : lse;  // nothing seen: P = 0
  if (!o.dropout) {
    for (int64_t j = 0; j < stop; j += VL) {
      const vfloat P = vexp2((load(x + j) * c - offset) * LOG2E);
      store(x + j, P);
      store(dp + j, P * (load(dp + j) - delta));
    }
  } else {
    dropout_row(o, b, h, i, j0, n, factor);
    for (int64_t j = 0; j < stop; j += VL) {
      const vfloat P = vexp2((load(x + j) * c - offset) * LOG2E), keep = load(factor + j);
      store(x + j, P * keep);
      store(dp + j, P * (load(dp + j) * keep - delta));
    }
  }
  if (o.softcap > 0 && !for_bias)
    for (int64_t j = 0; j < stop; j += VL) store(dp + j, load(dp + j) * load(slope + j));
}

// sum(dO O) of one row
template <class T>
FASTLM_INLINE float delta_of(const T* g, const T* y, int64_t Dv) {
  vfloat sum{};
  for (int64_t d = 0; d < Dv; d += VL) {
    if (Dv - d >= VL)
      sum += load(g + d) * load(y + d);
    else
      sum += load(g + d, int(Dv - d)) * load(y + d, int(Dv - d));
  }
  return hsum(sum);
}

// Rows r .. r + KP of a tile (row stride BK) to the panels of a B operand with `packed_k` rows.
template <class E>
FASTLM_INLINE void panel_rows(const float* tile, int64_t r, [[maybe_unused]] int64_t rows,
                              int64_t n, int64_t packed_k, E* panels) {
  const float* x = tile + r * BK;
  for (int64_t j = 0; j < n; j += VL, panels += packed_k * VL) {
    if constexpr (sizeof(E) == 4) {
      store(panels + r * VL, load(x + j));
    } else {
#ifdef FASTLM_BF16_DOT
      store_words(panels + r * VL, pair(load(x + j), r + 1 < rows ? load(x + BK + j) : vfloat{}));
#endif
    }
  }
}

// out[j][d] = scale * in[d][j] for rows j < n, widths D.
template <class T>
void store_transposed(const float* in, int64_t ld, int64_t n, int64_t D, float scale, T* out,
                      int64_t stride) {
  for (int64_t j = 0; j < n; j += VL)
    for (int64_t d = 0; d < D; d += VL) {
      vint r[VL];
      for (int t = 0; t < VL; ++t) r[t] = d + t < D ? as_int(load(in + (d + t) * ld + j)) : vint{};
      transpose(r);
      const int64_t width = std::min<int64_t>(VL, D - d);
      for (int64_t t = 0; t < std::min<int64_t>(VL, n - j); ++t) {
        const vfloat x = as_float(r[t]) * scale;
        if (width == VL)
          store(out + (j + t) * stride + d, x);
        else
          store(out + (j + t) * stride + d, x, int(width));
      }
    }
}

template <class T>
void store_rows(const float* in, int64_t ld, int64_t n, int64_t D, float scale, T* out,
                int64_t stride) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D; d += VL) {
      const vfloat x = load(in + i * ld + d) * scale;
      if (D - d >= VL)
        store(out + i * stride + d, x);
      else
        store(out + i * stride + d, x, int(D - d));
    }
}

// Sizes of a task's arrays, for `keys` keys and `queries` queries.
template <class E>
struct BackwardSizes {
  int64_t keys, queries, D, Dv, D_wide, k_panels, v_panels, k_rows, q_columns, dO_columns, q, dO;
  BackwardSizes(const AttentionShape& s, int64_t most_queries, int64_t most_keys, bool direct)
      : keys(round_up(most_keys, BK)), queries(round_up(most_queries, BQ)) {
    D = padded_k<E>(s.D), Dv = padded_k<E>(s.Dv), D_wide = round_up(s.D, VL);
    k_panels = keys * D, v_panels = keys * Dv, k_rows = keys * D_wide;
    q_columns = s.D * queries, dO_columns = s.Dv * queries;
    q = direct && D == s.D ? 0 : BQ * D, dO = direct && Dv == s.Dv ? 0 : BQ * Dv;
  }
  int64_t bytes(const AttentionShape& s) const {
    int64_t n = 0;
    for (int64_t e :
         {k_panels, v_panels, k_rows, q_columns, dO_columns, q, dO, BQ * BK, BQ * BK, BQ * BK})
      n += Buffer::size_of<E>(e);
    for (int64_t e : {keys * s.D, keys * s.Dv, queries * D_wide, queries, BQ * BK, BQ * BK, BK, BK})
      n += Buffer::size_of<float>(e);
    return n;
  }
};

template <class T>
BackwardSizes<Elem<T>> sizes_of(const AttentionShape& s, const SequenceLengths& lengths) {
  return {s, lengths.max_q, spans_of(s, lengths) == 1 ? lengths.max_k : SPAN,
          std::is_same_v<Elem<T>, T>};
}

// Sizes of a task of `backward_bias`, which takes one block of keys at a time.
template <class T>
BackwardSizes<Elem<T>> sizes_for_bias(const AttentionShape& s, const SequenceLengths& lengths) {
  return {s, lengths.max_q, BK, std::is_same_v<Elem<T>, T>};
}

// With several spans, the dq of each: spans x rows of all queries x H x padded D floats.
inline int64_t parts_of_dq(const AttentionShape& s, const SequenceLengths& lengths) {
  const int64_t spans = spans_of(s, lengths);
  return spans > 1 ? spans * lengths.all_rows * s.H * round_up(s.D, VL) : 0;
}

// Bytes of the workspace, which `backward_all` and `backward_bias` use one after the other.
template <class T>
int64_t bytes_of_backward(const AttentionShape& s, const SequenceLengths& lengths) {
  return round_up(parts_of_dq(s, lengths) * int64_t(sizeof(float)), 64) +
         omp_get_max_threads() *
             std::max(sizes_of<T>(s, lengths).bytes(s), sizes_for_bias<T>(s, lengths).bytes(s));
}

template <class T>
struct BackwardTask {
  using E = Elem<T>;
  const AttentionShape& s;
  const ScoreOptions& o;
  const GradientStrides& grad;
  const BackwardSizes<E>& size;
  const T *dout, *out;
  const float* lse;
  E *k_panels, *v_panels, *k_rows, *q_columns, *dO_columns, *q, *dO, *P, *dS, *dS_rows;
  float *dk, *dv, *dq, *delta, *scores, *dP, *factor, *slope;

  BackwardTask(const AttentionShape& s, const ScoreOptions& o, const GradientStrides& grad,
               const BackwardSizes<E>& size, const T* dout, const T* out, const float* lse,
               Buffer& memory)
      : s(s), o(o), grad(grad), size(size), dout(dout), out(out), lse(lse) {
    k_panels = memory.take<E>(size.k_panels), v_panels = memory.take<E>(size.v_panels);
    k_rows = memory.take<E>(size.k_rows);
    q_columns = memory.take<E>(size.q_columns), dO_columns = memory.take<E>(size.dO_columns);
    q = memory.take<E>(size.q), dO = memory.take<E>(size.dO);
    P = memory.take<E>(BQ * BK), dS = memory.take<E>(BQ * BK), dS_rows = memory.take<E>(BQ * BK);
    dk = memory.take<float>(size.keys * s.D), dv = memory.take<float>(size.keys * s.Dv);
    dq = memory.take<float>(size.queries * size.D_wide), delta = memory.take<float>(size.queries);
    scores = memory.take<float>(BQ * BK), dP = memory.take<float>(BQ * BK);
    factor = memory.take<float>(BK), slope = memory.take<float>(BK);
  }

  const T* dO_row(const AttentionSequence<T, T>& p, int64_t b, int64_t h, int64_t i) const {
    return dout + grad.dout.at(b, h, p.q0 + i);
  }

  // delta of every row of head h; returns the head's gradient of its sink.
  float rows_of_head(const AttentionSequence<T, T>& p, int64_t b, int64_t h) {
    double dsink = 0;  // terms have both signs: their sum may be far below any of them
    for (int64_t i = 0; i < p.queries; ++i) {
      const T *g = dO_row(p, b, h, i), *y = out + s.out.at(b, h, p.q0 + i);
      delta[i] = delta_of(g, y, s.Dv);
      if (grad.dlse_p) delta[i] -= grad.dlse_p[grad.dlse.at(b, h, p.q0 + i)];
      const float z = lse[s.lse.at(b, h, p.q0 + i)];
      if (o.sinks && z != -INFINITE) dsink -= double(std::exp(o.sinks[h] - z)) * delta[i];
    }
    return float(dsink);
  }

  void pack_head(const AttentionSequence<T, T>& p, int64_t b, int64_t h) {
    pack_a<E>(p.q + h * s.q.head, 1, s.q.row, s.D, p.queries, q_columns);
    pack_a<E>(dO_row(p, b, h, 0), 1, grad.dout.row, s.Dv, p.queries, dO_columns);
  }

  void pack_span(const AttentionSequence<T, T>& p, int64_t g, int64_t j_begin, int64_t j_end) {
    for (int64_t j = j_begin; j < j_end; j += BK) {
      const int64_t n = std::min(BK, j_end - j), at = j - j_begin;
      const T *k = p.k.base + g * p.k.head + j * p.k.row,
              *v = p.v.base + g * p.v.head + j * p.v.row;
      pack_b<E>(k, 1, p.k.row, s.D, n, k_panels + at * size.D);
      pack_b<E>(v, 1, p.v.row, s.Dv, n, v_panels + at * size.Dv);
      pack_b<E>(k, p.k.row, 1, n, s.D, k_rows + at * size.D_wide);
    }
  }

  // Whether forward_by_chunks computed the lse of these rows (see scores_as_decoded).
  bool as_decoded(const AttentionSequence<T, T>& p) const {
    return sizeof(E) == 4 && decodes(s, o, p.queries) && p.queries * round_up(s.D, VL) <= BQ * BK;
  }

  // The scores, summed in the same order as in decode_chunk. Their rounding errors are then those
  // in lse, and cancel: P of a key that outweighs the others is 1. With another order and large
  // scores, dv's error was 5 times as large.
  void scores_as_decoded(const AttentionSequence<T, T>& p, int64_t h, int64_t i0, int64_t rows,
                         int64_t j0, int64_t n) {
    const int64_t ldq = round_up(s.D, VL), g = h / (s.H / s.Hkv);
    float* wide = dP;  // not written yet
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = p.q + h * s.q.head + (i0 + r) * s.q.row;
      for (int64_t d = 0; d < s.D; d += VL)
        store(wide + r * ldq + d, s.D - d >= VL ? load(row + d) : load(row + d, int(s.D - d)));
      for (int64_t j = n; j < round_up(n, VL); ++j) scores[r * BK + j] = 0;
    }
    with_rows(rows, [&](auto R) {
      dot_rows<R.value>(wide, ldq, p.k.base + g * p.k.head + j0 * p.k.row, p.k.row, n, s.D, scores,
                        BK);
    });
  }

  // S and dP of queries [i0, i0 + rows) and keys [j0, j0 + n), then, in place, P and dS.
  void tile(const AttentionSequence<T, T>& p, int64_t b, int64_t h, int64_t i0, int64_t rows,
            int64_t j0, int64_t n, int64_t j_begin, bool for_bias) {
    int64_t lda;
    if (as_decoded(p)) {
      scores_as_decoded(p, h, i0, rows, j0, n);
    } else {
      const E* a = as_operand(p.q + h * s.q.head + i0 * s.q.row, s.q.row, rows, s.D, q, &lda);
      gemm<E>(rows, round_up(n, VL), s.D, a, lda, k_panels + (j0 - j_begin) * size.D, scores, BK,
              false);
    }
    const E* a = as_operand(dO_row(p, b, h, i0), grad.dout.row, rows, s.Dv, dO, &lda);
    gemm<E>(rows, round_up(n, VL), s.Dv, a, lda, v_panels + (j0 - j_begin) * size.Dv, dP, BK,
            false);
    for (int64_t r = 0; r < rows; ++r)
      backward_row(s, o, p, b, h, i0 + r, j0, n, lse[s.lse.at(b, h, p.q0 + i0 + r)], delta[i0 + r],
                   for_bias, scores + r * BK, dP + r * BK, factor, slope);
  }

  // Whether some query of [i0, i0 + rows) sees a key of [j0, j0 + n).
  bool visible(const AttentionSequence<T, T>& p, int64_t i0, int64_t rows, int64_t j0,
               int64_t n) const {
    return s.span(i0 + rows - 1, p.queries, p.keys).end > j0 &&
           s.span(i0, p.queries, p.keys).first < j0 + n;
  }

  // Adds head h's share to dk^T, dv^T of keys [j_begin, j_end); computes dq of head h from these
  // keys.
  void run_head(const AttentionSequence<T, T>& p, int64_t b, int64_t h, int64_t j_begin,
                int64_t j_end, bool first_head) {
    const int64_t ldt = padded_k<E>(p.queries);
    memset(dq, 0, size_t(p.queries * size.D_wide) * sizeof(float));
    for (int64_t j0 = j_begin; j0 < j_end; j0 += BK) {
      const int64_t n = std::min(BK, j_end - j0), wide = round_up(n, VL);
      float *dk_block = dk + (j0 - j_begin) * s.D, *dv_block = dv + (j0 - j_begin) * s.Dv;
      if (first_head) {
        memset(dk_block, 0, size_t(BK * s.D) * sizeof(float));
        memset(dv_block, 0, size_t(BK * s.Dv) * sizeof(float));
      }
      for (int64_t i0 = 0; i0 < p.queries; i0 += BQ) {
        const int64_t rows = std::min(BQ, p.queries - i0), k = padded_k<E>(rows);
        if (!visible(p, i0, rows, j0, n)) continue;
        tile(p, b, h, i0, rows, j0, n, j_begin, false);
        for (int64_t r = 0; r < rows; ++r) {
          E* row = dS_rows + r * BK;
          for (int64_t j = 0; j < wide; j += VL) store(row + j, load(dP + r * BK + j));
          if (padded_k<E>(n) > wide)
            memset(row + wide, 0, size_t(padded_k<E>(n) - wide) * sizeof(E));
        }
        for (int64_t r = 0; r < rows; r += KP<E>) {
          panel_rows<E>(scores, r, rows, wide, k, P);
          panel_rows<E>(dP, r, rows, wide, k, dS);
        }
        for (int64_t panel = 0; panel < wide / VL && k > round_up(rows, KP<E>); ++panel) {
          const int64_t from = (panel * k + round_up(rows, KP<E>)) * VL, to = (panel + 1) * k * VL;
          memset(P + from, 0, size_t(to - from) * sizeof(E));
          memset(dS + from, 0, size_t(to - from) * sizeof(E));
        }
        gemm<E>(s.Dv, wide, rows, dO_columns + i0, ldt, P, dv_block, BK, true);
        gemm<E>(s.D, wide, rows, q_columns + i0, ldt, dS, dk_block, BK, true);
        gemm<E>(rows, size.D_wide, n, dS_rows, BK, k_rows + (j0 - j_begin) * size.D_wide,
                dq + i0 * size.D_wide, size.D_wide, true);
      }
    }
  }
};

template <class T>
void backward_all(const AttentionShape& s, const ScoreOptions& o, const GradientStrides& grad,
                  const AttentionSequence<T, T>* sequences, const T* dout, const T* out,
                  const float* lse, T* dq, T* dk, T* dv, const SequenceLengths& lengths,
                  Workspace workspace) {
  using E = Elem<T>;
  const int64_t spans = spans_of(s, lengths), all_rows = lengths.all_rows, G = s.H / s.Hkv,
                D_wide = round_up(s.D, VL);
  float* dq_parts = workspace.take<float>(parts_of_dq(s, lengths));
  const BackwardSizes<E> size = sizes_of<T>(s, lengths);
  workspace.divide(size.bytes(s));
  // below it a second thread costs more than it saves: 10 products of 131072 are 10 us
  const bool worthwhile = s.B * s.H * lengths.max_q * lengths.max_k * (s.D + s.Dv) > 262144;
#pragma omp parallel num_threads(workspace.threads) if (worthwhile)
  {
    Buffer memory(workspace.thread_part());
    BackwardTask<T> task(s, o, grad, size, dout, out, lse, memory);
    TileScope tiles;
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t g = 0; g < s.Hkv; ++g)
        for (int64_t span = 0; span < spans; ++span) {
          const AttentionSequence<T, T>& p = sequences[b];
          const int64_t j_begin = spans == 1 ? 0 : std::min(p.keys, span * SPAN),
                        j_end = spans == 1 ? p.keys : std::min(p.keys, (span + 1) * SPAN);
          task.pack_span(p, g, j_begin, j_end);
          for (int64_t h = g * G; h < (g + 1) * G; ++h) {
            const float dsink = task.rows_of_head(p, b, h);
            if (grad.dsinks && span == 0) grad.dsinks[b * s.H + h] = dsink;
            task.pack_head(p, b, h);
            task.run_head(p, b, h, j_begin, j_end, h == g * G);
            if (spans == 1)
              store_rows(task.dq, D_wide, p.queries, s.D, o.scale, dq + grad.dq.at(b, h, p.q0),
                         grad.dq.row);
            else
              for (int64_t i = 0; i < p.queries; ++i)
                memcpy(dq_parts + ((span * all_rows + p.before + i) * s.H + h) * D_wide,
                       task.dq + i * D_wide, size_t(D_wide) * sizeof(float));
          }
          for (int64_t j0 = j_begin; j0 < j_end; j0 += BK) {
            const int64_t n = std::min(BK, j_end - j0);
            store_transposed(task.dk + (j0 - j_begin) * s.D, BK, n, s.D, o.scale,
                             dk + grad.dk.at(b, g, p.k0 + j0), grad.dk.row);
            store_transposed(task.dv + (j0 - j_begin) * s.Dv, BK, n, s.Dv, 1.f,
                             dv + grad.dv.at(b, g, p.k0 + j0), grad.dv.row);
          }
        }
    if (spans > 1) {
#pragma omp for schedule(static) collapse(2)
      for (int64_t b = 0; b < s.B; ++b)
        for (int64_t h = 0; h < s.H; ++h)
          for (int64_t i = 0; i < sequences[b].queries; ++i) {
            const AttentionSequence<T, T>& p = sequences[b];
            float* first = dq_parts + ((p.before + i) * s.H + h) * D_wide;
            for (int64_t span = 1; span < spans; ++span)
              for (int64_t d = 0; d < D_wide; d += VL)
                store(first + d,
                      load(first + d) + load(first + span * all_rows * s.H * D_wide + d));
            store_rows(first, D_wide, 1, s.D, o.scale, dq + grad.dq.at(b, h, p.q0 + i), 0);
          }
    }
  }
}

// n rows of T to float32; rows of `ld` floats, a whole number of vectors, zeros beyond D.
template <class T>
FASTLM_INLINE void widen_rows(const T* rows, int64_t stride, int64_t n, int64_t D, int64_t ld,
                              float* out) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < D; d += VL)
      store(out + j * ld + d,
            D - d >= VL ? load(rows + j * stride + d) : load(rows + j * stride + d, int(D - d)));
}

FASTLM_INLINE float dot(const float* a, const float* b, int64_t n) {
  vfloat sum{};
  for (int64_t d = 0; d < n; d += VL) sum += load(a + d) * load(b + d);
  return hsum(sum);
}

// out += factor * x
FASTLM_INLINE void add_scaled(float factor, const float* x, int64_t n, float* out) {
  for (int64_t d = 0; d < n; d += VL) store(out + d, load(out + d) + factor * load(x + d));
}

template <class T>
void backward_few(const AttentionShape& s, const ScoreOptions& o, const GradientStrides& grad,
                  const AttentionSequence<T, T>* sequences, const T* dout, const T* out,
                  const float* lse, T* dq, T* dk, T* dv) {
  FlushDenormals flush;
  alignas(64) float K[FEW * FEW_WIDE], V[FEW * FEW_WIDE], dK[FEW * FEW_WIDE], dV[FEW * FEW_WIDE],
      q[FEW_WIDE], dO[FEW_WIDE], dQ[FEW_WIDE], P[2 * FEW], dS[2 * FEW], factor[64], slope[2 * FEW];
  const int64_t G = s.H / s.Hkv, D = round_up(s.D, VL), Dv = round_up(s.Dv, VL);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t g = 0; g < s.Hkv; ++g) {
      const AttentionSequence<T, T>& p = sequences[b];
      widen_rows(p.k.base + g * p.k.head, p.k.row, p.keys, s.D, D, K);
      widen_rows(p.v.base + g * p.v.head, p.v.row, p.keys, s.Dv, Dv, V);
      memset(dK, 0, size_t(p.keys * D) * sizeof(float));
      memset(dV, 0, size_t(p.keys * Dv) * sizeof(float));
      for (int64_t h = g * G; h < (g + 1) * G; ++h) {
        double dsink = 0;
        for (int64_t i = 0; i < p.queries; ++i) {
          const T* dO_row = dout + grad.dout.at(b, h, p.q0 + i);
          widen_rows(p.q + h * s.q.head + i * s.q.row, 0, 1, s.D, D, q);
          widen_rows(dO_row, 0, 1, s.Dv, Dv, dO);
          float delta = delta_of(dO_row, out + s.out.at(b, h, p.q0 + i), s.Dv);
          if (grad.dlse_p) delta -= grad.dlse_p[grad.dlse.at(b, h, p.q0 + i)];
          const float z = lse[s.lse.at(b, h, p.q0 + i)];
          if (o.sinks && z != -INFINITE) dsink -= double(std::exp(o.sinks[h] - z)) * delta;
          for (int64_t j = 0; j < 2 * FEW; ++j) P[j] = dS[j] = 0;
          for (int64_t j = 0; j < p.keys; ++j) dS[j] = dot(dO, V + j * Dv, Dv);
          if (decodes(s, o, p.queries))  // see scores_as_decoded
            dot_rows<1>(q, D, p.k.base + g * p.k.head, p.k.row, p.keys, s.D, P, 2 * FEW);
          else
            for (int64_t j = 0; j < p.keys; ++j) P[j] = dot(q, K + j * D, D);
          backward_row(s, o, p, b, h, i, 0, p.keys, z, delta, false, P, dS, factor, slope);
          memset(dQ, 0, size_t(D) * sizeof(float));
          for (int64_t j = 0; j < p.keys; ++j) {
            add_scaled(dS[j], K + j * D, D, dQ);
            add_scaled(dS[j], q, D, dK + j * D);
            add_scaled(P[j], dO, Dv, dV + j * Dv);
          }
          store_rows(dQ, D, 1, s.D, o.scale, dq + grad.dq.at(b, h, p.q0 + i), 0);
        }
        if (grad.dsinks) grad.dsinks[b * s.H + h] = float(dsink);
      }
      store_rows(dK, D, p.keys, s.D, o.scale, dk + grad.dk.at(b, g, p.k0), grad.dk.row);
      store_rows(dV, Dv, p.keys, s.Dv, 1.f, dv + grad.dv.at(b, g, p.k0), grad.dv.row);
    }
}

// to[r][j] += tile (rows, n), row stride BK; a stride `row` or `key` of 0 sums over that index. A
// tile is summed before it is added: adding thousands of elements to one large sum lost ten times
// as much to rounding.
inline void add_tile(const float* tile, int64_t rows, int64_t n, int64_t row, int64_t key,
                     float* sums, float* to) {
  if (row && key) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; ++j) to[r * row + j * key] += tile[r * BK + j];
    return;
  }
  const auto at = [&](int64_t r, int64_t j) {
    const float* x = tile + r * BK + j;
    return n - j >= VL ? load(x) : load(x, int(n - j));
  };
  if (row) {
    for (int64_t r = 0; r < rows; ++r) {
      vfloat sum{};
      for (int64_t j = 0; j < n; j += VL) sum += at(r, j);
      to[r * row] += hsum(sum);
    }
    return;
  }
  vfloat total{};
  for (int64_t j = 0; j < n; j += VL) {
    vfloat sum[4] = {};
    for (int64_t r = 0; r < rows; ++r) sum[r % 4] += at(r, j);
    const vfloat all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    store(sums + j, all), total += all;
  }
  if (!key) *to += hsum(total);
  for (int64_t j = 0; key && j < n; ++j) to[j * key] += sums[j];
}

// dbias: a task owns one block of rows (all rows where the bias has one row) of one batch entry and
// head of the bias. It sums over the sequences, heads, rows and keys that share an element, in
// order. S and dP are recomputed for it; only a bias that needs a gradient pays for that.
template <class T>
void backward_bias(const AttentionShape& s, const ScoreOptions& o, const GradientStrides& grad,
                   const AttentionSequence<T, T>* sequences, const T* dout, const T* out,
                   const float* lse, const TensorView& dbias, const SequenceLengths& lengths,
                   Workspace workspace) {
  using E = Elem<T>;
  float* p_dbias = dbias.data<float>("dbias");
  const auto stride = [&](int i) { return dbias.size(i) == 1 ? 0 : dbias.stride(i); };
  const int64_t bias_b = dbias.size(0), bias_h = dbias.size(1), row = stride(2), key = stride(3);
  const int64_t blocks = row ? (lengths.max_q + BQ - 1) / BQ : 1, G = s.H / s.Hkv;
  const BackwardSizes<E> size = sizes_for_bias<T>(s, lengths);
  workspace.divide(size.bytes(s));
#pragma omp parallel num_threads(workspace.threads)
  {
    Buffer memory(workspace.thread_part());
    BackwardTask<T> task(s, o, grad, size, dout, out, lse, memory);
    TileScope tiles;
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t bb = 0; bb < bias_b; ++bb)
      for (int64_t bh = 0; bh < bias_h; ++bh)
        for (int64_t block = 0; block < blocks; ++block)
          for (int64_t b = bias_b == 1 ? 0 : bb; b < (bias_b == 1 ? s.B : bb + 1); ++b)
            for (int64_t h = bias_h == 1 ? 0 : bh; h < (bias_h == 1 ? s.H : bh + 1); ++h) {
              const AttentionSequence<T, T>& p = sequences[b];
              const int64_t i_end = row ? std::min(p.queries, (block + 1) * BQ) : p.queries;
              task.rows_of_head(p, b, h);
              for (int64_t j0 = 0; j0 < p.keys; j0 += BK) {
                const int64_t n = std::min(BK, p.keys - j0);
                task.pack_span(p, h / G, j0, j0 + n);
                for (int64_t i0 = block * BQ; i0 < i_end; i0 += BQ) {
                  const int64_t rows = std::min(BQ, i_end - i0);
                  if (!task.visible(p, i0, rows, j0, n)) continue;
                  task.tile(p, b, h, i0, rows, j0, n, j0, true);
                  add_tile(task.dP, rows, n, row, key, task.factor,
                           p_dbias + bb * stride(0) + bh * stride(1) + i0 * row + j0 * key);
                }
              }
            }
  }
}
