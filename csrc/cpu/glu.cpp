#define FASTLM_BODY "cpu/glu.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(glu_forward, "gate up act y")
FASTLM_OP(glu_backward, "dy gate up act dgate dup")
