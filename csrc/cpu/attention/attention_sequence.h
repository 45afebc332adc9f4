// One AttentionSequence per sequence: pointers to its rows. Only here do dense, packed and paged
// tensors differ.

constexpr int64_t ROW_PAD = 32;  // packed keys start at its multiples; every K_STEP<E> divides it

// Strides in elements of a tensor with rows of heads.
struct HeadStrides {
  int64_t batch, head, row;  // batch 0: packed
  FASTLM_INLINE int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * batch + h * head + i * row;
  }
};

// Keys or values of one sequence: rows of one tensor, or pages of a cache.
template <class C>
struct KeyRows {
  const C* base;
  int64_t head, row;
  const int32_t* table;  // null: not paged
  int64_t page_size, page;

  // Sets `p` to row j of head h; returns how many rows from there on are `row` elements apart.
  FASTLM_INLINE int64_t run(int64_t h, int64_t j, int64_t end, const C** p) const {
    const C* start = base + h * head;
    if (!table) {
      *p = start + j * row;
      return end - j;
    }
    *p = start + table[j / page_size] * page + j % page_size * row;
    return std::min(end - j, page_size - j % page_size);
  }
};

template <class T, class C>
struct AttentionSequence {
  const T* q;
  KeyRows<C> k, v;
  int64_t out, lse;  // offsets of its first row
  int64_t queries, keys;
  int64_t q0, k0;  // its first row within its batch entry: 0 unless packed
  int64_t before;  // queries of the sequences before it
  int64_t packed;  // its first row of packed keys
};

// Keys that row i sees: [first, end).
struct KeySpan {
  int64_t first, end;
};

struct AttentionShape {
  int64_t B, H, Hkv, D, Dv;
  HeadStrides q, k, v, out, lse;
  bool causal, packed;
  int64_t window;

  FASTLM_INLINE KeySpan span(int64_t i, int64_t S, int64_t keys) const {
    if (!causal && window == 0) return {0, keys};
    const int64_t last = i + keys - S;  // the key at the query's position
    const int64_t end = std::clamp<int64_t>(last + 1, 0, keys);
    return {window ? std::clamp<int64_t>(last - window + 1, 0, end) : 0, end};
  }
};

constexpr int64_t FEW_SEQUENCES = 16;  // up to this many sequences are on the stack: 3 KiB

// Bytes of the workspace for more sequences than that.
template <class T, class C>
int64_t bytes_of_sequences(const AttentionShape& s) {
  return s.B <= FEW_SEQUENCES ? 0 : round_up(s.B * int64_t(sizeof(AttentionSequence<T, C>)), 64);
}

inline HeadStrides strides_of(const TensorView& t, int batch, int head, int row) {
  return {batch < 0 ? 0 : t.stride(batch), t.stride(head), t.stride(row)};
}

// Sizes and strides; `out` like q in layout, `lse` (B, H, S) or (H, total_q).
inline AttentionShape shape_of(const AttentionInputs& in, const TensorView& out,
                               const TensorView& lse) {
  AttentionShape s{};
  s.causal = in.options.causal, s.window = in.options.window;
  s.packed = bool(in.layout.cu_seqlens_q);
  s.D = in.q.size(-1), s.Dv = in.v.size(-1);
  if (in.layout.cu_seqlens_q) {
    s.B = in.layout.cu_seqlens_q->size(0) - 1, s.H = in.q.size(1), s.Hkv = in.k.size(1);
    s.q = strides_of(in.q, -1, 1, 0), s.out = strides_of(out, -1, 1, 0);
    s.k = strides_of(in.k, -1, 1, 0), s.v = strides_of(in.v, -1, 1, 0);
    s.lse = strides_of(lse, -1, 0, 1);
  } else if (in.layout.block_table) {
    s.B = in.q.size(0), s.H = in.q.size(2), s.Hkv = in.k.size(2);
    s.q = strides_of(in.q, 0, 2, 1), s.out = strides_of(out, 0, 2, 1);
    s.k = strides_of(in.k, 0, 2, 1), s.v = strides_of(in.v, 0, 2, 1);
    s.lse = strides_of(lse, 0, 1, 2);
  } else {
    s.B = in.q.size(0), s.H = in.q.size(1), s.Hkv = in.k.size(1);
    s.q = strides_of(in.q, 0, 1, 2), s.out = strides_of(out, 0, 1, 2);
    s.k = strides_of(in.k, 0, 1, 2), s.v = strides_of(in.v, 0, 1, 2);
    s.lse = strides_of(lse, 0, 1, 2);
  }
  return s;
}

inline void check_offsets(const char* argument, const int32_t* offsets, int64_t n, int64_t total) {
  bool good = offsets[0] == 0 && offsets[n - 1] == total;
  for (int64_t b = 1; b < n; ++b) good = good && offsets[b - 1] <= offsets[b];
  if (!good)
    throw std::invalid_argument(std::string(argument) + ": expected offsets that rise from 0 to " +
                                std::to_string(total) + ", got " + std::to_string(offsets[0]) +
                                " .. " + std::to_string(offsets[n - 1]) + " (" + std::to_string(n) +
                                " of them)");
}

inline void check_pages(const AttentionInputs& in, const int32_t* table, int64_t b, int64_t keys) {
  const int64_t page_size = in.k.size(1);
  for (int64_t p = 0; p * page_size < keys; ++p)
    if (table[p] < 0 || table[p] >= in.k.size(0))
      throw std::invalid_argument("block_table: expected pages 0 to " +
                                  std::to_string(in.k.size(0) - 1) + ", got " +
                                  std::to_string(table[p]) + " for sequence " + std::to_string(b));
}

inline void check_lengths(const int32_t* lens, int64_t n, int64_t capacity) {
  for (int64_t b = 0; b < n; ++b)
    if (lens[b] < 0 || lens[b] > capacity)
      throw std::invalid_argument("seq_lens: expected 0 to " + std::to_string(capacity) +
                                  " (pages a sequence x page size), got " +
                                  std::to_string(lens[b]) + " for sequence " + std::to_string(b));
}

// The rows of each sequence. Offsets and lengths are checked before anything is read through them.
struct SequenceOffsets {
  const int32_t *cu_q = nullptr, *cu_k = nullptr, *lens = nullptr;
  int64_t queries = 0, keys = 0;  // of each sequence, unless it is packed; keys: unless paged

  SequenceOffsets(const AttentionInputs& in, const AttentionShape& s) {
    const AttentionLayout& layout = in.layout;
    if (layout.cu_seqlens_q) {
      cu_q = layout.cu_seqlens_q->data<int32_t>("cu_seqlens_q");
      cu_k = layout.cu_seqlens_k->data<int32_t>("cu_seqlens_k");
      check_offsets("cu_seqlens_q", cu_q, s.B + 1, in.q.size(0));
      check_offsets("cu_seqlens_k", cu_k, s.B + 1, in.k.size(0));
    } else if (layout.block_table) {
      lens = layout.seq_lens->data<int32_t>("seq_lens");
      check_lengths(lens, s.B, layout.block_table->size(1) * in.k.size(1));
      queries = in.q.size(1);
    } else {
      queries = in.q.size(2), keys = in.k.size(2);
    }
  }
  int64_t queries_of(int64_t b) const { return cu_q ? cu_q[b + 1] - cu_q[b] : queries; }
  int64_t keys_of(int64_t b) const { return cu_k ? cu_k[b + 1] - cu_k[b] : lens ? lens[b] : keys; }
};

struct SequenceLengths {
  int64_t max_q = 0, max_k = 0;          // of the longest sequence
  int64_t all_rows = 0, all_packed = 0;  // queries and packed keys of all sequences

  SequenceLengths(const AttentionShape& s, const SequenceOffsets& offsets) {
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t queries = offsets.queries_of(b), keys = offsets.keys_of(b);
      max_q = std::max(max_q, queries), max_k = std::max(max_k, keys);
      all_rows += queries, all_packed += round_up(keys, ROW_PAD);
    }
  }
};

// Fills sequences[B]. Checks every page before anything is read through it.
template <class T, class C>
void make_sequences(const AttentionInputs& in, const AttentionShape& s,
                    const SequenceOffsets& offsets, AttentionSequence<T, C>* sequences) {
  const T* q = in.q.data<T>("q");
  const C *k = in.k.data<C>("k"), *v = in.v.data<C>("v");
  const int32_t* tables =
      offsets.lens ? in.layout.block_table->data<int32_t>("block_table") : nullptr;
  int64_t packed = 0, before = 0;
  for (int64_t b = 0; b < s.B; ++b) {
    AttentionSequence<T, C>& p = sequences[b];
    const int32_t* table = nullptr;
    p.q0 = offsets.cu_q ? offsets.cu_q[b] : 0, p.k0 = offsets.cu_k ? offsets.cu_k[b] : 0;
    p.queries = offsets.queries_of(b), p.keys = offsets.keys_of(b);
    if (tables) {
      table = tables + b * in.layout.block_table->stride(0);
      check_pages(in, table, b, offsets.lens[b]);
    }
    p.q = q + s.q.at(b, 0, p.q0);
    p.k = {k, s.k.head, s.k.row, table, table ? in.k.size(1) : 0, s.k.batch};
    p.v = {v, s.v.head, s.v.row, table, table ? in.k.size(1) : 0, s.v.batch};
    if (!table) p.k.base += s.k.at(b, 0, p.k0), p.v.base += s.v.at(b, 0, p.k0);
    p.packed = packed, p.before = before;
    packed += round_up(p.keys, ROW_PAD), before += p.queries;
    if (in.extras.bias) {
      const int64_t rows = in.extras.bias->size(2), keys = in.extras.bias->size(3);
      if ((rows != 1 && rows < p.queries) || (keys != 1 && keys < p.keys))
        throw std::invalid_argument("bias: expected at least (" + std::to_string(p.queries) + ", " +
                                    std::to_string(p.keys) + ") for sequence " + std::to_string(b) +
                                    ", got (" + std::to_string(rows) + ", " + std::to_string(keys) +
                                    ")");
    }
  }
}

// Rows j .. j + n of head h as E, contiguous, D elements each.
template <class E, class C>
void gather_rows(const KeyRows<C>& rows, int64_t h, int64_t j, int64_t n, int64_t D, E* out) {
  for (int64_t end = j + n; j < end;) {
    const C* p;
    const int64_t count = rows.run(h, j, end, &p);
    for (int64_t i = 0; i < count; ++i, out += D)
      for (int64_t d = 0; d < D; ++d) {
        if constexpr (std::is_same_v<E, C>)
          out[d] = p[i * rows.row + d];
        else if constexpr (std::is_same_v<C, int8_t>)
          out[d] = from_float<E>(float(p[i * rows.row + d]));  // exact: 8 bits fit in a bf16
        else
          out[d] = from_float<E>(to_float(p[i * rows.row + d]));
      }
    j += count;
  }
}
