// simt: CUDA kernels on a CPU, with the checks of a debugger.
//
// A .cu file that uses the instructions of csrc/cuda/ptx.cuh compiles with g++ against this header.
// Every CUDA thread is a fiber. The threads of a block run in turn, in a random order by a seed,
// and wait for each other at warp collectives and barriers. docs/simt.md lists the errors that this
// finds. It cannot find an error that the emulator and a kernel share (fragment layouts were never
// run on a GPU), nor effects of the hardware's weak memory order, registers or timing.
//
//   fiber     a stack, and switching to another
//   block     threads, barriers, warp collectives, the scheduler
//   order     the happens-before order
//   memory    checks of accesses, races
//   warp      shuffles, votes, ldmatrix, mma
//   async     cp.async
//   cuda      CUDA's names
//   count     transactions and bank conflicts
#pragma once

#include "simt/async.h"
#include "simt/count.h"
#include "simt/cuda.h"

// __shared__ T name[N], one per block; read and written by load and store.
#define SHARED(T, name, N) \
  T* const name = ::simt::shared_array<T, N>([] {}, ::simt::Site::current())
#define DYNAMIC_SHARED(name) unsigned char* const name = ::simt::self->block->shared->dynamic

namespace simt {

template <class T, size_t N, class Variable>
T* shared_array(Variable, const Site& site) {
  static const size_t id = new_variable();  // one per variable and instantiation
  return static_cast<T*>(self->block->shared->variable(id, N * sizeof(T), alignof(T), site));
}

// An empty grid launches nothing.
template <class... P, class... A>
void launch(const Launch& how, void (*kernel)(P...), A... arguments) {
  if (!how.grid.x || !how.grid.y || !how.grid.z) return;
  run(how, [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace simt
