// Barriers in shared memory that tell of copies' arrival, and bulk copies (sm_90 and later).

#pragma once

#include "common.cuh"

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

__device__ __forceinline__ void arrive_at(uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .b64 state;\n"
        "mbarrier.arrive.shared::cta.b64 state, [%0];\n"
        "}" ::"r"(shared_address(barrier))
        : "memory");
}

// compute-sanitizer's racecheck follows a barrier for the threads that arrive at it alone, not for those that one of them
// speaks for. Built for it, all arrive.
#ifdef SINF_RACECHECK
constexpr bool ALL_ARRIVE = true;
#else
constexpr bool ALL_ARRIVE = false;
#endif

// Arrivals of n_threads threads of which one speaks for all.
__device__ __forceinline__ constexpr uint32_t arrivals(uint32_t n_threads) { return ALL_ARRIVE ? n_threads : 1; }

// Waits for a moment where the device can, else asks.
#if __CUDA_ARCH__ >= 900
#define TRY_PARITY "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define TRY_PARITY "mbarrier.test_wait.parity.shared::cta.b64"
#endif

// Returns once the barrier's phase of this parity is over; of a new barrier, the phase of parity 1 is.
__device__ __forceinline__ void wait_at(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n" TRY_PARITY
        " done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// True if wait_at would not wait.
__device__ __forceinline__ bool is_over(uint64_t* barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return over != 0;
}

// The barrier is told once this thread's copies so far, by copy_async, have arrived: one of its arrivals.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

// n_bytes, a multiple of 16, to shared memory; one thread asks. They arrive at barrier, which has to expect them. What is
// read once leaves L2 before what is read again.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t n_bytes, uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .b64 once;\n"
        "createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once;\n"
        "}" ::"r"(shared_address(to)),
        "l"(from), "r"(n_bytes), "r"(shared_address(barrier))
        : "memory");
}

// Asks L2 for n_bytes, a multiple of 16.
__device__ __forceinline__ void ask_l2(const void* from, uint32_t n_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(n_bytes) : "memory");
}

#endif
