// simt: CUDA kernels on a CPU, with the checks of a debugger.
//
// A .cu file that takes its instructions from csrc/cuda/ptx.cuh compiles with g++ against this
// header. What it does: every CUDA thread is a fiber, a block's threads take turns in an order
// drawn with a seed, warp collectives and barriers are where they meet. What it finds:
// docs/simt.md. What it cannot find: an error that this emulator and a kernel share (fragment
// layouts were never seen on a GPU), the hardware's weak memory order, registers, time.
//
//   fiber     a stack, and switching to another
//   block     threads, barriers, warp collectives, the scheduler
//   order     what comes before what
//   memory    what an access may touch, races in shared memory
//   warp      shuffles, votes, ldmatrix, mma
//   async     cp.async
//   cuda      CUDA's names
//   count     transactions and bank conflicts
#pragma once

#include "simt/async.h"
#include "simt/count.h"
#include "simt/cuda.h"

// __shared__ T name[N] for every block; read and written by load and store.
#define SHARED(T, name, N) \
  T* const name = ::simt::shared_array<T, N>([] {}, ::simt::Site::current())
#define DYNAMIC_SHARED(name) unsigned char* const name = ::simt::self->block->shared->dynamic

namespace simt {

template <class T, size_t N, class Variable>
T* shared_array(Variable, const Site& site) {
  static const size_t id = new_variable();  // one for each variable of each instantiation
  return static_cast<T*>(self->block->shared->variable(id, N * sizeof(T), alignof(T), site));
}

// An empty grid starts nothing.
template <class... P, class... A>
void launch(const Launch& how, void (*kernel)(P...), A... arguments) {
  if (!how.grid.x || !how.grid.y || !how.grid.z) return;
  run(how, [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace simt
