// Few rows of bf16 times int4 (quantized_linear.h): B of the matrix core holds q itself, which is
// exact in bf16 and takes two operations per 32 instead of eight. The sums of each group are
// scaled, a pass over C in the L1.
template <int BITS, class E>
constexpr bool SCALED_SUMS =
#if defined(FASTLM_BF16_DOT) && !defined(FASTLM_AMX)
    BITS == 4 && sizeof(E) == 2;
#else
    false;
#endif
// Most rows of x: it pays 10 % at 16 and 3 % at 128. Below a block of the engine's cache (64 rows),
// so that products of whole blocks have the same bits in every batch.
constexpr int64_t SCALED_M = 63;
constexpr int64_t SCALED_SIZE = 64;  // least columns of a group: 16 products per sum and pass

#if defined(FASTLM_BF16_DOT) && !defined(FASTLM_AMX)
// Panel of rows [n, n + rows) of W, columns [k0, k0 + kb), k0 a multiple of CHUNK: q as bf16.
// Elements beyond W are -8, where A is zero. `ahead`: see load_transposed.
inline void integer_panel(const Weight& w, int64_t n, int rows, int64_t k0, int64_t kb,
                          int64_t ahead, bf16* out) {
  // the bit at which each byte of two lanes begins: nibbles 0 and 1 of a byte share a word
  const __m512i first = _mm512_set1_epi64(0x2424202004040000);
  const __m512i table = nibble_table();
  for (int64_t k = 0; k < kb; k += CHUNK<4>) {
    vint t[VL];
    load_transposed(w, n, rows, (k0 + k) / PER_LANE<4>, ahead, t);
    const int64_t lanes = std::min<int64_t>(VL, (kb - k + PER_LANE<4> - 1) / PER_LANE<4>);
    for (int64_t j = 0; j < lanes; ++j)
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte, out += 2 * VL) {
        const __m512i bits = _mm512_add_epi8(first, _mm512_set1_epi8(char(8 * byte)));
        const __m512i nibbles = _mm512_multishift_epi64_epi8(bits, (__m512i)t[j]);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(nibbles, table));
      }
  }
}

// C (ROWS, NR) (+)= A . B over columns [k0, k0 + kb) of W; scales as [panel][group][VL].
template <int ROWS>
void micro_scaled(const Weight& w, int64_t k0, int64_t kb, const bf16* a, int64_t lda,
                  const bf16* next, const bf16* b, const float* scales, float* c) {
  const int64_t panel = padded_k<bf16>(kb) * VL;
  for (int64_t k = 0; k < kb;) {
    const int64_t g = (k0 + k) / w.size, end = std::min(kb, (g + 1) * w.size - k0);
    vfloat acc[ROWS][NP];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < NP; ++p) acc[r][p] = vfloat{};
    products<bf16>(end - k, a + k, lda, next + k, b + k * VL, panel, acc);
#pragma GCC unroll 4
    for (int p = 0; p < NP; ++p) {
      const vfloat s = load(scales + (p * w.groups + g) * VL);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        float* to = c + r * NR + p * VL;
        store(to, k0 + k ? load(to) + acc[r][p] * s : acc[r][p] * s);
      }
    }
    k = end;
  }
}

// The same for m rows.
inline void gemm_scaled(int64_t m, const Weight& w, int64_t k0, int64_t kb, const bf16* a,
                        int64_t lda, const bf16* b, const float* scales, float* c) {
  const auto block = [&](auto rows, int64_t i) {
    const bf16 *rows_of_a = a + i * lda, *next = m - i >= 2 * MR ? rows_of_a + MR * lda : rows_of_a;
    micro_scaled<decltype(rows)::value>(w, k0, kb, rows_of_a, lda, next, b, scales, c + i * NR);
  };
  int64_t i = 0;
  for (; i + MR <= m; i += MR) block(std::integral_constant<int, MR>{}, i);
  static_assert(MR == 6);
  switch (m - i) {
    case 1:
      return block(std::integral_constant<int, 1>{}, i);
    case 2:
      return block(std::integral_constant<int, 2>{}, i);
    case 3:
      return block(std::integral_constant<int, 3>{}, i);
    case 4:
      return block(std::integral_constant<int, 4>{}, i);
    case 5:
      return block(std::integral_constant<int, 5>{}, i);
  }
}
#endif
