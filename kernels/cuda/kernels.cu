// Every kernel in one translation unit: one fat binary.

#include "attention.cu"
#include "decode.cu"
#include "down.cu"
#include "gate_up.cu"
#include "matvec.cu"
#include "prefill_attention.cu"
#include "prefill_gemm.cu"
#include "prefill_gemm_hopper.cu"
#include "prefill_mlp.cu"
#include "prefill_rows.cu"
#include "qkv.cu"
#include "token.cu"
