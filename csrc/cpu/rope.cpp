#define FASTLM_BODY "cpu/rope.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(rope, "q k cos sin interleaved inverse q_out k_out")
