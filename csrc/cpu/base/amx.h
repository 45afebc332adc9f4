// One wrapper per AMX instruction; tile numbers are template arguments because the instruction
// encodes them. With FASTLM_AMX_EMULATED the eight tiles are arrays and the products plain loops:
// same results up to the order of fp32 additions, so the code that uses tiles is tested on machines
// that have none.
//
// A tile is 16 rows of 64 bytes: 16 x 16 fp32 or int32, 16 x 32 bf16, 16 x 64 int8.
#ifdef FASTLM_AMX_EMULATED
alignas(64) inline thread_local unsigned char tiles[8][16][64];

template <int T>
FASTLM_INLINE void tile_zero() {
  memset(tiles[T], 0, sizeof tiles[T]);
}
template <int T>
FASTLM_INLINE void tile_load(const void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(tiles[T][r], static_cast<const char*>(p) + r * row_bytes, 64);
}
template <int T>
FASTLM_INLINE void tile_store(void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * row_bytes, tiles[T][r], 64);
}
template <int C, int A, int B>
inline void tile_bf16() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        bf16 a[2], b[2];
        float c;
        memcpy(a, tiles[A][m] + 4 * k, 4);
        memcpy(b, tiles[B][k] + 4 * n, 4);
        memcpy(&c, tiles[C][m] + 4 * n, 4);
        c += to_float(a[0]) * to_float(b[0]) + to_float(a[1]) * to_float(b[1]);
        memcpy(tiles[C][m] + 4 * n, &c, 4);
      }
}
template <int C, int A, int B>
inline void tile_int8() {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        int8_t a[4], b[4];
        int32_t c;
        memcpy(a, tiles[A][m] + 4 * k, 4);
        memcpy(b, tiles[B][k] + 4 * n, 4);
        memcpy(&c, tiles[C][m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i) c += int32_t(a[i]) * b[i];
        memcpy(tiles[C][m] + 4 * n, &c, 4);
      }
}
struct TileScope {
  FlushDenormals flush;
};
#else
template <int T>
FASTLM_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// tileloaddt1, which hints that p is read once, was 10 % slower for B and up to 5 % for A.
template <int T>
FASTLM_INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
FASTLM_INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
}
// C += A . B; B holds pairs (bf16) or quadruples (int8) of consecutive k in each 32-bit element.
// Intel and AT&T order differ: the destination is last here.
template <int C, int A, int B>
FASTLM_INLINE void tile_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
FASTLM_INLINE void tile_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The tile configuration belongs to a thread and outlives parallel regions. It is loaded when a
// thread begins its work (55 ns) and released at the end, so that the operating system does not
// have to save 8 KiB at each switch.
struct TileScope {
  FlushDenormals flush;
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
};
#endif
