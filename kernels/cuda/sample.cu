// sample: draws the next token from logits, as kernels/src/sample.rs defines it: the same token as on a processor.
//
// Computes   chosen = the draw over candidates in order of (distance from the best, id) that top_k, top_p and min_p keep
// Reference  sample::reference, exactly
// Shapes     logits (n,) f32, excluded ones overwritten with -inf; excluded (n_excluded,) u32; chosen (1,) u32
// Needs      state.position is the position of the token to be chosen
// Grid       one block of SAMPLE_THREADS threads
// Bytes      logits, from L2: three passes where top_k leaves few candidates, else up to twelve
// Measured   H100 80GB, 32000 logits: greedy 7 us, top-k 40 25 us, top-p alone 92 us; 262144: 17, 62, 575 us; records/
// Order      every sum is of integers: any order gives the same bits. The list is filled in any order, then sorted
//
// With a top_k, a histogram of distances says where the k-th candidate lies, to 1/64 of a logit; what is not farther away
// goes to a list in shared memory, which is sorted, and the rest is running sums over it. Without one, or where too many
// candidates are equal, each filter is a search for the distance at which a sum reaches its goal, by histograms of the
// leading 11, the next 11 and the last 10 binary digits of distances.

#include "common.cuh"

#ifndef SAMPLE_THREADS
#define SAMPLE_THREADS 1024
#endif
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr int SAMPLE_BINS = 2048;
constexpr int SAMPLE_DIGITS = 11;
// Most candidates that are sorted.
constexpr int SAMPLE_LIST = 2048;
constexpr int SAMPLE_BINS_EACH = SAMPLE_BINS / SAMPLE_THREADS;
constexpr int SAMPLE_LIST_EACH = SAMPLE_LIST / SAMPLE_THREADS;
// Instead of a token: a logit is NaN or plus infinity; no token is left.
constexpr uint32_t SAMPLE_BAD_LOGIT = 0xfffffffe;
constexpr uint32_t SAMPLE_EMPTY = 0xffffffff;
// Past every distance.
constexpr uint32_t SAMPLE_FAR = 0xffffffff;

struct SampleArgs {
    float* logits;
    const uint32_t* excluded;
    State* state;
    uint32_t* chosen;
    uint64_t seed;
    uint64_t top_p;
    uint32_t top_k;
    uint32_t distance_max;
    float scale;
    float scale_one;
    int32_t n;
    int32_t n_excluded;
    int32_t greedy;
};

// False where v is too far from best. No fused operations, as on a processor.
__device__ __forceinline__ bool sample_distance(float best, float v, uint32_t& q) {
    const float units = __fmul_rn(__fsub_rn(best, v), 134217728.0f);
    q = __float2uint_rz(units);
    return units < 4294967296.0f;
}

__device__ __forceinline__ uint64_t sample_weight(uint32_t q, float scale) {
    constexpr float TERMS[10] = {1.0f,           -0.6931472f,     0.2402265f,       -0.05550411f,     0.009618129f,
                                 -0.0013333558f, 0.0001540353f,   -0.000015252734f, 0.0000013215486f, -0.00000010178086f};
    const float halvings = __fmul_rn(__uint2float_rn(q), scale);
    if (halvings >= 41.0f) {
        return 0;
    }
    const float whole = floorf(halvings);
    const float part = __fsub_rn(halvings, whole);
    float power = TERMS[9];
#pragma unroll
    for (int k = 8; k >= 0; k--) {
        power = __fadd_rn(__fmul_rn(power, part), TERMS[k]);
    }
    return __float2ull_rz(__fmul_rn(power, 1099511627776.0f)) >> static_cast<int>(whole);
}

// 64 bits of Philox4x32-10.
__device__ __forceinline__ uint64_t sample_random(uint64_t seed, uint32_t position) {
    uint32_t c[4] = {position, 0, 0, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high_0 = __umulhi(0xd2511f53u, c[0]);
        const uint32_t low_0 = 0xd2511f53u * c[0];
        const uint32_t high_1 = __umulhi(0xcd9e8d57u, c[2]);
        const uint32_t low_1 = 0xcd9e8d57u * c[2];
        c[0] = high_1 ^ c[1] ^ key[0];
        c[1] = low_1;
        c[2] = high_0 ^ c[3] ^ key[1];
        c[3] = low_0;
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    return c[0] | static_cast<uint64_t>(c[1]) << 32;
}

// The sum that top_p asks for.
__device__ __forceinline__ uint64_t sample_top_p_need(uint64_t total, uint64_t top_p) {
    const uint64_t need = __umul64hi(total, top_p) << 32 | (total * top_p) >> 32;
    return need > 0 ? need : 1;
}

struct SampleShared {
    uint64_t bins[SAMPLE_BINS];
    uint64_t list[SAMPLE_LIST];
    uint64_t sums[SAMPLE_WARPS];
    uint64_t before;
    float best[SAMPLE_WARPS];
    uint32_t id[SAMPLE_WARPS];
    uint32_t counts[SAMPLE_WARPS];
    uint32_t found;
    uint32_t n_list;
    uint32_t bad;
};

// Candidates nearer than end, and the first n_at_end of those at it. Distances never are SAMPLE_FAR.
struct SampleKept {
    uint32_t end;
    uint64_t n_at_end;
};

struct Sample {
    const SampleArgs& a;
    SampleShared& s;
    float best;

    __device__ __forceinline__ bool candidate(int i, uint32_t& q) const {
        return sample_distance(best, __ldcg(a.logits + i), q);
    }

    // The sum of v over the threads before this one; total over all. Ends past a barrier.
    __device__ __forceinline__ uint64_t sum_before(uint64_t v, uint64_t& total) const {
        uint64_t running = v;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const uint64_t other = __shfl_up_sync(0xffffffffu, running, offset);
            running += lane_id() >= offset ? other : 0;
        }
        __syncthreads();
        if (lane_id() == WARP - 1) {
            s.sums[warp_id()] = running;
        }
        __syncthreads();
        uint64_t before = 0;
        total = 0;
        for (int warp = 0; warp < SAMPLE_WARPS; warp++) {
            before += warp < warp_id() ? s.sums[warp] : 0;
            total += s.sums[warp];
        }
        return before + running - v;
    }

    // Where the running sum of value(i) over [0, N_EACH * threads) reaches need_of(total): that i in found, the sum
    // before it in before, the same for all threads. The total is not zero.
    template <int N_EACH, typename Value, typename Need>
    __device__ __forceinline__ uint32_t reach(const Value& value, const Need& need_of, uint64_t& before, uint64_t& need) const {
        uint64_t values[N_EACH];
        uint64_t sum = 0;
#pragma unroll
        for (int k = 0; k < N_EACH; k++) {
            values[k] = value(threadIdx.x * N_EACH + k);
            sum += values[k];
        }
        uint64_t total;
        uint64_t running = sum_before(sum, total);
        need = need_of(total);
#pragma unroll
        for (int k = 0; k < N_EACH; k++) {
            if (running < need && need <= running + values[k]) {
                s.found = threadIdx.x * N_EACH + k;
                s.before = running;
            }
            running += values[k];
        }
        __syncthreads();
        before = s.before;
        return s.found;
    }

    // The smallest distance up to which the masses of kept candidates reach need_of(sum of all); rest is what the
    // candidates at that distance have to add.
    template <typename Mass, typename Need>
    __device__ __forceinline__ uint32_t search(SampleKept kept, const Mass& mass, const Need& need_of, uint64_t& rest) const {
        uint32_t prefix = 0;
        uint32_t known = 0;
        uint64_t need = 0;
#pragma unroll 1
        for (int level = 0; level < 3; level++) {
            const int shift = level == 0 ? 21 : level == 1 ? 10 : 0;
            const uint32_t digits = level == 2 ? 0x3ff : 0x7ff;
            for (int bin = threadIdx.x; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
                s.bins[bin] = 0;
            }
            __syncthreads();
            const auto add = [&](uint32_t q, uint64_t m) {
                if ((q & known) == prefix && m > 0) {
                    atomicAdd(reinterpret_cast<unsigned long long*>(s.bins + ((q >> shift) & digits)),
                              static_cast<unsigned long long>(m));
                }
            };
#pragma unroll 8
            for (int i = threadIdx.x; i < a.n; i += SAMPLE_THREADS) {
                uint32_t q;
                if (candidate(i, q) && q < kept.end) {
                    add(q, mass(q));
                }
            }
            if (threadIdx.x == 0 && kept.end != SAMPLE_FAR) {
                add(kept.end, kept.n_at_end * mass(kept.end));
            }
            __syncthreads();
            uint64_t before;
            const uint64_t wanted = need;
            const uint32_t bin = reach<SAMPLE_BINS_EACH>(
                [&](int bin) { return s.bins[bin]; },
                [&](uint64_t total) { return level == 0 ? need_of(total) : wanted; }, before, need);
            need -= before;
            prefix |= bin << shift;
            known |= digits << shift;
            __syncthreads();
        }
        rest = need;
        return prefix;
    }

    // The id of candidate number index, by id, of those at distance q.
    __device__ __forceinline__ uint32_t at_distance(uint32_t q, uint32_t index) const {
        int lo = 0;
        int hi = a.n;
        int each;
        do {
            each = ((hi - lo + SAMPLE_WARPS - 1) / SAMPLE_WARPS + WARP - 1) / WARP * WARP;
            const int begin = lo + warp_id() * each;
            const int end = min(begin + each, hi);
            uint32_t count = 0;
#pragma unroll 8
            for (int first = begin; first < end; first += WARP) {
                uint32_t other;
                const int i = first + lane_id();
                count += __popc(__ballot_sync(0xffffffffu, i < end && candidate(i, other) && other == q));
            }
            if (lane_id() == 0) {
                s.counts[warp_id()] = count;
            }
            __syncthreads();
            int warp = 0;
            while (warp < SAMPLE_WARPS - 1 && index >= s.counts[warp]) {
                index -= s.counts[warp];
                warp++;
            }
            __syncthreads();
            lo += warp * each;
            hi = min(lo + each, hi);
        } while (each > WARP);
        uint32_t other;
        const int i = lo + lane_id();
        uint32_t hits = __ballot_sync(0xffffffffu, i < hi && candidate(i, other) && other == q);
        for (; index > 0; index--) {
            hits &= hits - 1;
        }
        return lo + __ffs(hits) - 1;
    }

    // Sorts the first n (a power of two) of the list.
    __device__ __forceinline__ void sort(int n) const {
        for (int run = 2; run <= n; run *= 2) {
            for (int step = run / 2; step > 0; step /= 2) {
                for (int pair = threadIdx.x; pair < n / 2; pair += SAMPLE_THREADS) {
                    const int low = 2 * step * (pair / step) + pair % step;
                    const uint64_t x = s.list[low];
                    const uint64_t y = s.list[low + step];
                    if ((x > y) == ((low & run) == 0)) {
                        s.list[low] = y;
                        s.list[low + step] = x;
                    }
                }
                __syncthreads();
            }
        }
    }

    // True if the candidates up to the bin of the top_k-th are in the list, n of them, sorted.
    __device__ __forceinline__ bool fill_list(uint32_t& n) const {
        // Counts of tokens fit 32 bits, for which shared memory has an addition of its own.
        uint32_t* const bins = reinterpret_cast<uint32_t*>(s.bins);
        for (int bin = threadIdx.x; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
            bins[bin] = 0;
        }
        if (threadIdx.x == 0) {
            s.n_list = 0;
        }
        __syncthreads();
#pragma unroll 8
        for (int i = threadIdx.x; i < a.n; i += SAMPLE_THREADS) {
            uint32_t q;
            if (candidate(i, q)) {
                atomicAdd(bins + (q >> (32 - SAMPLE_DIGITS)), 1u);
            }
        }
        __syncthreads();
        uint64_t before, need;
        const uint32_t last = reach<SAMPLE_BINS_EACH>(
            [&](int bin) { return static_cast<uint64_t>(bins[bin]); },
            [&](uint64_t total) { return min(static_cast<uint64_t>(a.top_k), total); }, before, need);
        const uint64_t n_near = before + bins[last];
        if (n_near > SAMPLE_LIST) {
            __syncthreads();
            return false;
        }
#pragma unroll 8
        for (int i = threadIdx.x; i < a.n; i += SAMPLE_THREADS) {
            uint32_t q;
            if (candidate(i, q) && q >> (32 - SAMPLE_DIGITS) <= last) {
                s.list[atomicAdd(&s.n_list, 1u)] = static_cast<uint64_t>(q) << 32 | static_cast<uint32_t>(i);
            }
        }
        n = static_cast<uint32_t>(n_near);
        int padded = 2;
        while (padded < static_cast<int>(n)) {
            padded *= 2;
        }
        for (int i = n + threadIdx.x; i < padded; i += SAMPLE_THREADS) {
            s.list[i] = UINT64_MAX;
        }
        __syncthreads();
        sort(padded);
        return true;
    }

    __device__ __forceinline__ uint32_t draw_from_list(uint32_t n, uint64_t random) const {
        n = min(n, a.top_k);
        uint64_t before, need;
        const auto distance = [&](int i) { return static_cast<uint32_t>(s.list[i] >> 32); };
        if (a.top_p < 1ull << 32) {
            n = 1 + reach<SAMPLE_LIST_EACH>(
                        [&](int i) { return i < n ? sample_weight(distance(i), a.scale_one) : 0; },
                        [&](uint64_t total) { return sample_top_p_need(total, a.top_p); }, before, need);
            __syncthreads();
        }
        const uint32_t found = reach<SAMPLE_LIST_EACH>(
            [&](int i) { return i < n && distance(i) <= a.distance_max ? sample_weight(distance(i), a.scale) : 0; },
            [&](uint64_t total) { return __umul64hi(total, random) + 1; }, before, need);
        return static_cast<uint32_t>(s.list[found]);
    }

    __device__ __forceinline__ uint32_t draw_from_all(uint64_t random) const {
        SampleKept kept = {SAMPLE_FAR, 0};
        uint64_t rest;
        if (a.top_k > 0) {
            const auto one = [](uint32_t) { return static_cast<uint64_t>(1); };
            kept.end = search(kept, one, [&](uint64_t total) { return min(static_cast<uint64_t>(a.top_k), total); }, rest);
            kept.n_at_end = rest;
        }
        if (a.top_p < 1ull << 32) {
            const auto mass = [&](uint32_t q) { return sample_weight(q, a.scale_one); };
            const uint32_t end =
                search(kept, mass, [&](uint64_t total) { return sample_top_p_need(total, a.top_p); }, rest);
            const uint64_t each = mass(end);
            kept = {end, (rest + each - 1) / each};
        }
        if (a.distance_max < kept.end) {
            kept = {a.distance_max + 1, 0};
        }
        const auto mass = [&](uint32_t q) { return sample_weight(q, a.scale); };
        const uint32_t q = search(kept, mass, [&](uint64_t total) { return __umul64hi(total, random) + 1; }, rest);
        return at_distance(q, static_cast<uint32_t>((rest - 1) / mass(q)));
    }
};

extern "C" __global__ __launch_bounds__(SAMPLE_THREADS) void sample(const __grid_constant__ SampleArgs a) {
    __shared__ SampleShared s;
    wait_for_previous();
    if (threadIdx.x == 0) {
        s.bad = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.n_excluded; i += SAMPLE_THREADS) {
        const uint32_t id = a.excluded[i];
        if (id < static_cast<uint32_t>(a.n)) {
            if (!(__ldcg(a.logits + id) < INFINITY)) {
                atomicOr(&s.bad, 1u);
            } else {
                a.logits[id] = -INFINITY;
            }
        }
    }
    __syncthreads();
    float best = -INFINITY;
    uint32_t id = SAMPLE_EMPTY;
    bool bad = false;
    const auto offer = [&](float value, uint32_t at) {
        if (value > best || (value == best && at < id)) {
            best = value;
            id = at;
        }
    };
    const auto reduce = [&]() {
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const float value = __shfl_xor_sync(0xffffffffu, best, offset);
            const uint32_t at = __shfl_xor_sync(0xffffffffu, id, offset);
            offer(value, at);
        }
    };
#pragma unroll 8
    for (int i = threadIdx.x; i < a.n; i += SAMPLE_THREADS) {
        const float v = __ldcg(a.logits + i);
        bad |= !(v < INFINITY);
        offer(v, i);
    }
    reduce();
    if (lane_id() == 0) {
        s.best[warp_id()] = best;
        s.id[warp_id()] = id;
    }
    if (bad) {
        atomicOr(&s.bad, 1u);
    }
    __syncthreads();
    best = lane_id() < SAMPLE_WARPS ? s.best[lane_id()] : -INFINITY;
    id = lane_id() < SAMPLE_WARPS ? s.id[lane_id()] : SAMPLE_EMPTY;
    reduce();

    uint32_t chosen = id;
    if (s.bad) {
        chosen = SAMPLE_BAD_LOGIT;
    } else if (best == -INFINITY) {
        chosen = SAMPLE_EMPTY;
    } else if (!a.greedy) {
        const Sample sample = {a, s, best};
        const uint64_t random = sample_random(a.seed, __ldcg(&a.state->position));
        uint32_t n;
        if (a.top_k > 0 && a.top_k <= SAMPLE_LIST && sample.fill_list(n)) {
            chosen = sample.draw_from_list(n, random);
        } else {
            chosen = sample.draw_from_all(random);
        }
    }
    if (threadIdx.x == 0) {
        *a.chosen = chosen;
        a.state->token = chosen;
    }
}
