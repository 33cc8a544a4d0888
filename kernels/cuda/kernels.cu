// Every kernel in one translation unit: one fat binary.

#include "attention.cu"
#include "decode.cu"
#include "down.cu"
#include "gate_up.cu"
#include "matvec.cu"
#include "qkv.cu"
#include "token.cu"
