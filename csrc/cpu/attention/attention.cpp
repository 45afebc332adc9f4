#include "cpu/attention/attention_inputs.h"
#define FASTLM_BODY "cpu/attention/attention.h"
#include "cpu/base/each_isa.h"

FASTLM_OP(attention_forward, "q k v layout extras options out lse workspace")
FASTLM_OP(attention_backward, "dout dlse q k v out lse layout extras options gradients workspace")
