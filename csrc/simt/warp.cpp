#include "simt/warp.h"

namespace simt {
namespace {

struct VoteArgument {
  bool predicate;
  uint32_t result;
};

struct LdmatrixArgument {
  uint32_t* registers;
  const void* row;
  int matrices;
  bool transposed;
};

template <class D>
struct MmaArgument {
  D* d;
  const uint32_t *a, *b;
};

float value(__nv_bfloat16 x) { return __bfloat162float(x); }
float value(__half x) { return __half2float(x); }
int value(int8_t x) { return x; }

template <class E, class D>
void multiply(void** arguments, uint32_t, const Site&) {
  constexpr int kPer = 4 / sizeof(E), kDepth = 8 * kPer;  // elements per register, per row of a
  // sums of int8 wrap around, as without .satfinite
  using Sum = std::conditional_t<std::is_same_v<D, int>, uint32_t, D>;
  D a[16][kDepth], b[kDepth][8];
  Sum c[16][8];
  const auto at = [&](int lane) { return static_cast<MmaArgument<D>*>(arguments[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * kPer;
    E e[kPer];
    for (int i = 0; i < 4; ++i) {  // upper left, lower left, upper right, lower right
      std::memcpy(static_cast<void*>(e), &at(lane)->a[i], 4);
      for (int j = 0; j < kPer; ++j)
        a[row + i % 2 * 8][column + i / 2 * (kDepth / 2) + j] = value(e[j]);
    }
    for (int i = 0; i < 2; ++i) {
      std::memcpy(static_cast<void*>(e), &at(lane)->b[i], 4);
      for (int j = 0; j < kPer; ++j) b[column + i * (kDepth / 2) + j][row] = value(e[j]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) c[m][n] = 0;
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += static_cast<Sum>(a[m][k] * b[k][n]);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      D& d = at(lane)->d[i];
      d = static_cast<D>(static_cast<Sum>(d) + c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
}

template <class E, class D>
void mma_of(const char* name, D* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  MmaArgument<D> tiles{d, a, b};
  collective(kAllLanes, name, &tiles, multiply<E, D>, site);
}

}  // namespace

uint32_t ballot(uint32_t mask, bool predicate, const Site& site) {
  VoteArgument vote{predicate, 0};
  const Operation count = [](void** arguments, uint32_t lanes_of, const Site&) {
    uint32_t result = 0;
    for (uint32_t lanes = lanes_of; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      result |= uint32_t(static_cast<VoteArgument*>(arguments[lane])->predicate) << lane;
    }
    for (uint32_t lanes = lanes_of; lanes; lanes &= lanes - 1)
      static_cast<VoteArgument*>(arguments[__builtin_ctz(lanes)])->result = result;
  };
  collective(mask, "a vote", &vote, count, site);
  return vote.result;
}

void sync_warp(uint32_t mask, const Site& site) {
  const Operation join = [](void** arguments, uint32_t lanes, const Site&) {
    join_at_syncwarp(static_cast<Warp*>(arguments[__builtin_ctz(lanes)])->syncs_before, lanes);
  };
  collective(mask, "__syncwarp", self->warp, join, site);
}

void load_matrices(uint32_t* registers, int matrices, bool transposed, const void* row,
                   const Site& site) {
  if (self->lane < 8 * matrices) {
    if (!self->block->shared->contains(row))
      fail("ldmatrix: not an address of shared memory", site);
    check(row, 16, 16, Access::read, site);
  }
  LdmatrixArgument rows{registers, row, matrices, transposed};
  const Operation load = [](void** arguments, uint32_t, const Site&) {
    const auto at = [&](int lane) { return static_cast<LdmatrixArgument*>(arguments[lane]); };
    for (int m = 0; m < at(0)->matrices; ++m)
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int r = at(0)->transposed ? lane % 4 * 2 + e : lane / 4;
          const int c = at(0)->transposed ? lane / 4 : lane % 4 * 2 + e;
          std::memcpy(&pair[e], static_cast<const uint16_t*>(at(8 * m + r)->row) + c, 2);
        }
        std::memcpy(&at(lane)->registers[m], pair, 4);
      }
  };
  collective(kAllLanes, "ldmatrix", &rows, load, site);
}

void mma(float* d, const uint32_t* a, const uint32_t* b, __nv_bfloat16, const Site& site) {
  mma_of<__nv_bfloat16>("mma of bfloat16", d, a, b, site);
}
void mma(float* d, const uint32_t* a, const uint32_t* b, __half, const Site& site) {
  mma_of<__half>("mma of float16", d, a, b, site);
}
void mma(int* d, const uint32_t* a, const uint32_t* b, int8_t, const Site& site) {
  mma_of<int8_t>("mma of int8", d, a, b, site);
}

}  // namespace simt
