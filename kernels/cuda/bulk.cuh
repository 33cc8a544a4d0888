// Bulk copies into shared memory and the barriers there that tell of their arrival (sm_90 and later).

#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

__device__ __forceinline__ void wait_at(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// n_bytes, a multiple of 16, to shared memory; one thread asks. They arrive at barrier, which has to expect them.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t n_bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(n_bytes), "r"(shared_address(barrier))
        : "memory");
}

#endif
