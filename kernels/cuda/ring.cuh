// A ring of slots in shared memory: one warp fills them with rows, in the order in which they will be used, and the
// other warps of the block read every row together.
//
// Source     the producer and the consumers of CUTLASS's pipelines (sm90_pipeline.hpp)
// Needs      init_ring by the whole block, then a barrier of it; slots on multiples of RING_ALIGN bytes
// Order      a slot is full when its row has arrived, empty when every reading warp has passed it

#pragma once

#include "bulk.cuh"

constexpr int SLOTS_MAX = 64;
// Copies into shared memory write lines of this many bytes, and cost half as much again across two.
constexpr int RING_ALIGN = 128;

struct RingRoom {
    char* slots;
    int slot_bytes;
    int n_slots;
};

__device__ __forceinline__ uint64_t* full_slots() {
    __shared__ uint64_t barriers[SLOTS_MAX];
    return barriers;
}

__device__ __forceinline__ uint64_t* empty_slots() {
    __shared__ uint64_t barriers[SLOTS_MAX];
    return barriers;
}

__device__ __forceinline__ void init_ring(int n_slots, int n_readers) {
    // A bulk copy is asked for by one lane, copies of 16 bytes by all.
#if __CUDA_ARCH__ >= 900
    constexpr int N_FILLERS = 1;
#else
    constexpr int N_FILLERS = ALL_ARRIVE ? 2 * WARP : WARP;
#endif
    for (int slot = threadIdx.x; slot < n_slots; slot += blockDim.x) {
        init_barrier(full_slots() + slot, N_FILLERS);
        init_barrier(empty_slots() + slot, n_readers * arrivals(WARP));
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Bytes in memory that fill a slot, or its beginning; multiples of 16.
struct RingRow {
    const void* from;
    int n_bytes;
};

// For the warp that fills, whole. How many rows are on their way at once is bounded: what other loads the block waits for
// come behind them.
struct RingWriter {
    RingRoom room;
    int in_flight;       // rows, at most n_slots
    int in_flight_idle;  // the same while nobody waits for them yet
    int slot = 0;
    uint32_t parity = 1;

    // Rows row(0) to row(n - 1), each as soon as its slot is empty; wanted() is true once they are waited for.
    template <typename Wanted, typename Row>
    __device__ __forceinline__ void push(int n, const Wanted& wanted, const Row& row) {
#pragma unroll 1
        for (int first = 0; first < n; first += n_at_once()) {
            push_some(min(n_at_once(), n - first), wanted, [&](int i) { return row(first + i); });
        }
    }

    __device__ __forceinline__ int n_at_once() const { return min(WARP, room.n_slots); }

    // The same for at most n_at_once() rows. On sm_90 and later each lane asks for a row of its own; all lanes call row
    // together, there with an i of its own each, before with one i.
    template <typename Wanted, typename Row>
    __device__ __forceinline__ void push_some(int n, const Wanted& wanted, const Row& row) {
#if __CUDA_ARCH__ >= 900
        const bool wraps = slot + lane_id() >= room.n_slots;
        const int at = wraps ? slot + lane_id() - room.n_slots : slot + lane_id();
        const uint32_t turn = parity ^ (wraps ? 1 : 0);
        bool waits = lane_id() < n;
        const RingRow mine = row(waits ? lane_id() : 0);
        while (const uint32_t waiting = __ballot_sync(0xffffffffu, waits)) {
            const int ahead = wanted() ? in_flight : in_flight_idle;
            // One lane waits, for the slot that empties first: all of them would keep the others from the barriers.
            if (lane_id() == __ffs(waiting) - 1) {
                wait_at(empty_slots() + at, turn);
                wait_before(at, turn, ahead);
            }
            __syncwarp();
            if (waits && is_over(empty_slots() + at, turn) && came_before(at, turn, ahead)) {
                expect_bytes(full_slots() + at, mine.n_bytes);
                copy_bulk(room.slots + at * room.slot_bytes, mine.from, mine.n_bytes, full_slots() + at);
                waits = false;
            }
            __syncwarp();
        }
        move(n);
#else
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            wait_at(empty_slots() + slot, parity);
            wait_before(slot, parity, wanted() ? in_flight : in_flight_idle);
            const RingRow next = row(i);
            char* to = room.slots + slot * room.slot_bytes;
            for (int offset = lane_id() * 16; offset < next.n_bytes; offset += WARP * 16) {
                copy_async(to + offset, static_cast<const char*>(next.from) + offset, true);
            }
            arrive_after_copies(full_slots() + slot);
            if constexpr (ALL_ARRIVE) {
                // The copies are not the threads'.
                arrive_at(full_slots() + slot);
            }
            move(1);
        }
#endif
    }

    // The row so many before that of a slot has come; of the turn before this one where that is past the ring's beginning.
    __device__ __forceinline__ void wait_before(int at, uint32_t turn, int ahead) const {
        const bool wraps = at < ahead;
        wait_at(full_slots() + at - ahead + (wraps ? room.n_slots : 0), turn ^ (wraps ? 0 : 1));
    }
    __device__ __forceinline__ bool came_before(int at, uint32_t turn, int ahead) const {
        const bool wraps = at < ahead;
        return is_over(full_slots() + at - ahead + (wraps ? room.n_slots : 0), turn ^ (wraps ? 0 : 1));
    }

    __device__ __forceinline__ void move(int n) {
        slot += n;
        if (slot >= room.n_slots) {
            slot -= room.n_slots;
            parity ^= 1;
        }
    }
};

// For each warp that reads; all of them pass the same rows.
struct RingReader {
    RingRoom room;
    int slot = 0;
    uint32_t parity = 0;

    // The row that comes after so many others, less than n_slots; arrived or not.
    __device__ __forceinline__ const char* row(int after) const {
        const int at = slot + after;
        const char* from = room.slots + (at < room.n_slots ? at : at - room.n_slots) * room.slot_bytes;
        __builtin_assume(__isShared(from));
        return from;
    }

    // The same, once it has arrived.
    __device__ __forceinline__ const char* arrived(int after) const {
        const bool wraps = slot + after >= room.n_slots;
        wait_at(full_slots() + (wraps ? slot + after - room.n_slots : slot + after), parity ^ (wraps ? 1 : 0));
        return row(after);
    }

    // at may be past the ring's end.
    __device__ __forceinline__ void tell_empty(int at) const {
        arrive_at(empty_slots() + (at < room.n_slots ? at : at - room.n_slots));
    }

    // The warp has read the next n rows, at most a warp's lanes.
    __device__ __forceinline__ void pass(int n) {
        __syncwarp();
        if constexpr (ALL_ARRIVE) {
            for (int i = 0; i < n; i++) {
                tell_empty(slot + i);
            }
        } else if (lane_id() < n) {
            tell_empty(slot + lane_id());
        }
        slot += n;
        if (slot >= room.n_slots) {
            slot -= room.n_slots;
            parity ^= 1;
        }
    }
};
