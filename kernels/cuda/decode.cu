// decode: one whole token in one kernel, which keeps memory busy from the embedding to the logits.
//
// Computes   x = embedding[token]; for each layer what qkv, attention, matvec, gate_up and down compute, in that order;
//            logits = lm_head rmsnorm(x); with greedy, the next token too
// Source     persistent kernels for whole models: Megakernels (Hazy Research, 2025); queue of loads in shared memory:
//            the multistage pipelines of CUTLASS
// Reference  the five kernels above, each tested against reference; within TOLERANCE (sum order)
// Shapes     as theirs; x_out (d,) f32; down_parts (n_chunks, d) f32; part_sums (n_heads, n_splits_max, head_dim) f32,
//            part_maxima (n_heads, n_splits_max, 2) f32; best (gridDim.x, 2) u32; sync (2,) u32: arrivals, and arrivals
//            before this launch
// Needs      rows of 16-byte multiples, all matrices of one type, at most 128 layers; checked in cuda::launch
// Grid       one block for each SM, launched cooperatively; a phase of the model ends at a barrier of the whole grid
// Block      256 threads, 1-D; shared memory: the residual, one other vector, small lists, and the ring
// Warp       one segment of the rows of its group; the segment of the vector lies in registers. The ring is the warp's
//            own: it brings the warp's next items, in the order of the model and across phases, so that while the block
//            waits at a barrier or attends, the weights of the next dense phase arrive. Chosen rows of the MLP come
//            through the emptied ring as well, all that fit at once; the next layer's items are asked for after them, as
//            these would wait behind it. A predictor's planes come plane after plane of the same rows
// Bytes      weights, sign words or planes and cached positions that the token needs, each once
// Order      the work of each block, warp and lane is fixed by the shapes, the position and h; queues move work between
//            warps, never a sum: repeatable bit for bit
// Measured   H100 80GB, sm_90, f16, context 512, 7B shape: dense 5.13 ms a token, 2628 GB/s, 86 % of the read
//            bandwidth; predicted (21 % of rows kept, 10 % active) 2.95 ms, 2089 GB/s, 69 %; records/
// Tried      programmatic dependent launch of the five kernels: early blocks of the next kernel pack two to an SM and
//            leave others empty (7B dense: 6.5 ms a token against 5.8 without). Asking L2 for rows ahead
//            (cp.async.bulk.prefetch.L2): 2 to 40 % slower than plain loads. Shares in proportion to the speed of each SM
//            (those of small CPCs read 1.36 times as fast): blocks end together, the token as late as before. Two items
//            at a time from the ring: no faster. Asking for the next layer before the predictor, in the down projection
//            or after it: 0.4 to 3 % slower than right after h is stored. A ring off a line of 128 bytes: 10 % slower

#include "bulk.cuh"
#include "scores.cuh"

// Few warps with many registers: they hold a segment of the vector beside the loads in flight.
constexpr int DECODE_WARPS = 8;
constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
// 16-byte loads of a lane in an item.
constexpr int ITEM_LOADS = 8;
constexpr int DOWN_LANES = 16;
constexpr int DOWN_IN_FLIGHT = 20;
constexpr int DOWN_ROUND = 2 * DOWN_IN_FLIGHT;
constexpr int DOWN_QUEUE = DOWN_ROUND + WARP;
constexpr int H_IN_FLIGHT = 12;
constexpr int KV_IN_FLIGHT = 8;
constexpr int KV_DIMS = 8;
// Four columns for each thread at a time: vectors of at most 8192.
constexpr int VEC_LOADS = 8;
// Rows of sign words that a warp counts side by side.
constexpr int SIGN_ROWS = 8;
constexpr int MERGE_COLS = 4;
constexpr int MERGE_SPLITS = 4;
constexpr int SPLIT_POSITIONS = 128;
constexpr int LAYERS_MAX = 128;
constexpr int SLOTS_MAX = 16;
// Of the ring's slots: copies into shared memory write lines of this many bytes, and cost half as much again across two.
constexpr int RING_ALIGN = 128;

// How rows are dealt to the warps of a block.
struct ItemCut {
    int32_t n_cols;
    int32_t n_segs;    // segments of a row: 1 << seg_bits, at most DECODE_WARPS
    int32_t seg_bits;
    int32_t granules;  // 16-byte pieces in a segment, at most ITEM_LOADS * WARP; the last may have fewer
};

struct DecodeLayer {
    const void* w_q;
    const void* w_k;
    const void* w_v;
    const void* w_o;
    const void* w_gate;
    const void* w_up;
    const void* w_down_t;
    const uint32_t* signs;
    const uint32_t* low;     // planes below the signs
    const uint32_t* limits;  // of a score as bits of f32
    const float* attn_norm;
    const float* mlp_norm;
    void* keys;
    void* values;
    uint32_t limit;
    uint32_t rows;      // Rows of gate_up.cu
    uint32_t n_planes;  // of W_gate, where rows are predicted by their score; 0 where by their signs
};

struct DecodeArgs {
    const void* embedding;
    const void* lm_head;
    const float* final_norm;
    const float* cos;
    const float* sin;
    State* state;
    uint32_t* ids;
    float* x_out;
    float* q;
    float* part_sums;
    float* part_maxima;
    float* h;
    float* down_parts;
    float* logits;
    uint32_t* best;
    uint32_t* sync;
    unsigned long long* counts;  // (n_layers, 2): rows kept, rows active
    unsigned long long* clocks;  // (gridDim.x, STEPS) clocks of each block by step, added to; null for none
    ItemCut cut_d;
    ItemCut cut_q;
    int32_t n_layers;
    int32_t n_heads;
    int32_t n_kv_heads;
    int32_t head_dim;
    int32_t head_lanes;  // lanes that hold one position: a power of two, head_dim / 8 or more
    int32_t n_splits_max;
    int32_t n_rows;  // intermediate_size
    int32_t vocab_size;
    int32_t n_positions_max;
    int32_t n_ids;
    int32_t n_chunks;     // row chunks of the down projection
    int32_t slot_bytes;   // of the ring, for one item
    int32_t n_slots;      // of each warp's ring
    int32_t vec_floats;   // of the second vector
    int32_t tile_floats;  // room for partial sums
    int32_t list_rows;    // room in the lists of rows
    int32_t greedy;
    uint32_t activation;
    float threshold;
    float eps;
    float scale;           // log2(e) / sqrt(head_dim)
    float heads_per_pair;  // 2 / head_dim
    int32_t sign_rows;     // rows of sign words in an item; 0 where rows do not divide into 16 bytes
    DecodeLayer layers[LAYERS_MAX];
};

// Waits until fewer than n of the latest groups are in flight, or fewer still, for n up to the slots that the host chooses.
__device__ __forceinline__ void wait_copies_below(int n) {
    if (n >= 9) {
        wait_copies<8>();
    } else if (n == 8) {
        wait_copies<7>();
    } else if (n >= 5) {
        wait_copies<4>();
    } else if (n == 4) {
        wait_copies<3>();
    } else if (n == 3) {
        wait_copies<2>();
    } else if (n == 2) {
        wait_copies<1>();
    } else {
        wait_copies<0>();
    }
}

// The phases whose weights go through the ring, in their order within a layer; HEAD comes after the last layer.
enum Phase { QKV, OUT, MLP, HEAD, END };

// What a token's clocks are spent on. A wait is for the other blocks.
enum Step {
    NORM_QKV,
    ROWS_QKV,
    WAIT_QKV,
    ATTEND,
    WAIT_ATTEND,
    MERGE,
    ROWS_OUT,
    WAIT_OUT,
    NORM_MLP,
    PREDICT,
    ROWS_MLP,
    GATE,
    UP,
    WAIT_H,
    DOWN,
    WAIT_DOWN,
    NORM_HEAD,
    ROWS_HEAD,
    FINISH,
    STEPS
};

template <typename T>
struct Decoder {
    const DecodeArgs& a;

    // Shared memory, one array after the other; every length is a multiple of four.
    __device__ __forceinline__ static float* memory() {
        extern __shared__ float4 shared[];
        return reinterpret_cast<float*>(shared);
    }
    // x before the attention block of the layer, whole.
    __device__ __forceinline__ float* residual() const { return memory(); }
    // The other vector, and room for sums of warps.
    __device__ __forceinline__ float* vec() const { return memory() + a.cut_d.n_cols; }
    __device__ __forceinline__ float* tile() const { return vec() + a.vec_floats; }
    __device__ __forceinline__ float* h_rows() const { return tile() + a.tile_floats; }
    __device__ __forceinline__ int* kept() const { return reinterpret_cast<int*>(h_rows() + a.list_rows); }
    __device__ __forceinline__ int* active() const { return kept() + a.list_rows; }
    __device__ __forceinline__ uint32_t* x_signs() const {
        return reinterpret_cast<uint32_t*>(active() + a.list_rows);
    }
    // The planes of vec in 8 bits, where rows are predicted by their score.
    __device__ __forceinline__ uint32_t* x_planes() const { return x_signs(); }
    __device__ __forceinline__ uint4* ring() const {
        const uintptr_t end = reinterpret_cast<uintptr_t>(x_planes() + x_planes_words(n_words()));
        const uintptr_t rings = (end + RING_ALIGN - 1) & -static_cast<uintptr_t>(RING_ALIGN);
        return reinterpret_cast<uint4*>(rings) + warp_id() * a.n_slots * (a.slot_bytes / 16);
    }
    __device__ __forceinline__ static float* scratch() {
        __shared__ float floats[WARP];
        return floats;
    }

    // The ring: the slot whose item comes next, the slot that the next item asked for goes to, and the slots freed
    // without an item asked for; a run of items, equally far apart, that are to be asked for.
    int slot = 0;
    int ask_slot = 0;
    int n_owed = 0;
    uint32_t parity = 0;  // of the arrivals at slot
    const char* run_from = nullptr;  // this lane's first 16 bytes of the next item
    int run_step = 0;                // bytes from item to item
    int run_left = 0;
    int run_granules = 0;  // 16-byte pieces of an item
    // Where the run after that begins.
    int next_layer = 0;
    int next_phase = QKV;
    int next_item = 0;
    // Nothing past the chosen rows of this layer is asked for; the asking has come to them, or to the model's end.
    int last_layer = 0;
    bool at_last = false;
    int n_sign_items = 0;

    uint32_t barriers = 0;
    uint32_t arrivals_before = 0;
    long long marked = 0;  // the clock at the last mark

    __device__ __forceinline__ static unsigned long long* step_clocks() {
        __shared__ unsigned long long clocks[STEPS];
        return clocks;
    }

    // What passed since the last mark was spent on step.
    __device__ __forceinline__ void mark(int step) {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            const long long now = clock64();
            step_clocks()[step] += now - marked;
            marked = now;
        }
    }

    __device__ __forceinline__ void start_marks() {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            for (int step = 0; step < STEPS; step++) {
                step_clocks()[step] = 0;
            }
            marked = clock64();
        }
    }

    __device__ __forceinline__ void store_marks() const {
        if (a.clocks != nullptr && threadIdx.x == 0) {
            for (int step = 0; step < STEPS; step++) {
                a.clocks[blockIdx.x * STEPS + step] += step_clocks()[step];
            }
        }
    }

    __device__ __forceinline__ Decoder(const DecodeArgs& args) : a(args) {}

    // The block's run of a phase's units: pairs of rows of q, k and v, rows of the output, neurons, rows of lm_head.
    struct Share {
        int begin;
        int count;
    };
    __device__ __forceinline__ static Share* shares() {
        __shared__ Share all[END];
        return all;
    }
    __device__ __forceinline__ static Share share(int phase) { return shares()[phase]; }

    // Ends past a barrier of the block.
    __device__ __forceinline__ void make_shares() {
        if (threadIdx.x < END) {
            const int n_units = threadIdx.x == QKV   ? (a.n_heads + 2 * a.n_kv_heads) * (a.head_dim / 2)
                                : threadIdx.x == OUT ? a.cut_d.n_cols
                                : threadIdx.x == MLP ? a.n_rows
                                                     : a.vocab_size;
            const int begin = share_begin(n_units, blockIdx.x, gridDim.x);
            const int end = share_begin(n_units, blockIdx.x + 1, gridDim.x);
            shares()[threadIdx.x] = {begin, end - begin};
        }
        __syncthreads();
    }

    __device__ __forceinline__ int n_words() const { return (a.cut_d.n_cols + WARP - 1) / WARP; }
    // Rows of sign words in an item; zero where rows do not divide into 16 bytes and are read directly.
    __device__ __forceinline__ int sign_rows() const { return a.sign_rows; }
    // Head of a pair of rows, counted through q, k and v: exact for the few million pairs that there can be.
    __device__ __forceinline__ int head_of(int pair) const {
        return __float2int_rd((static_cast<float>(pair) + 0.5f) * a.heads_per_pair);
    }

    __device__ __forceinline__ const T* qkv_row(const DecodeLayer& w, int i) const {
        const int half = a.head_dim / 2;
        const int pair = share(QKV).begin + i / 2;
        int head = head_of(pair);
        const int dim = pair - head * half + (i & 1) * half;
        const void* matrix = w.w_q;
        if (head >= a.n_heads + a.n_kv_heads) {
            head -= a.n_heads + a.n_kv_heads;
            matrix = w.w_v;
        } else if (head >= a.n_heads) {
            head -= a.n_heads;
            matrix = w.w_k;
        }
        return static_cast<const T*>(matrix) + static_cast<int64_t>(head * a.head_dim + dim) * a.cut_d.n_cols;
    }

    __device__ __forceinline__ const T* mlp_row(const DecodeLayer& w, int i) const {
        const int first = share(MLP).begin;
        const bool all = w.rows == ALL;
        const void* matrix = all && (i & 1) ? w.w_up : w.w_gate;
        return static_cast<const T*>(matrix) + static_cast<int64_t>(first + (all ? i / 2 : i)) * a.cut_d.n_cols;
    }

    // Rows, or items of sign words, that the block has in a phase.
    __device__ __forceinline__ int n_items(int layer, int phase) const {
        switch (phase) {
            case QKV: return 2 * share(QKV).count;
            case MLP: {
                const uint32_t rows = a.layers[layer].rows;
                return rows == PREDICTED ? n_sign_items : (rows == ALL ? 2 : 1) * share(MLP).count;
            }
            default: return share(phase).count;
        }
    }

    // Finds the next run of this warp's items, in the order of the model; past the end there is none.
    __device__ __forceinline__ void find_run() {
        while (next_phase != END) {
            const bool signs = next_phase == MLP && a.layers[next_layer].rows == PREDICTED;
            const ItemCut& cut = next_phase == OUT ? a.cut_q : a.cut_d;
            const int seg_bits = signs ? 0 : cut.seg_bits;
            const int n_groups = DECODE_WARPS >> seg_bits;
            // Planes of the same rows come one after the other.
            const int n_planes = signs ? max(1, a.layers[next_layer].n_planes) : 1;
            const int round = n_planes == 1 ? next_item : next_item / n_planes;
            const int plane = next_item - round * n_planes;
            const int i = (warp_id() >> seg_bits) + round * n_groups;
            const int n = n_items(next_layer, next_phase);
            if (i < n) {
                const DecodeLayer& w = a.layers[next_layer];
                const char* from;
                run_left = (n - i + n_groups - 1) / n_groups;
                if (signs) {
                    const int row_bytes = n_words() * 4;
                    const int n_rows = min(sign_rows(), share(MLP).count - i * sign_rows());
                    from = reinterpret_cast<const char*>(plane == 0 ? w.signs : w.low) +
                           static_cast<int64_t>(share(MLP).begin + i * sign_rows()) * row_bytes;
                    run_granules = n_rows * row_bytes / 16;
                    if (n_planes == 1) {
                        run_step = n_groups * sign_rows() * row_bytes;
                        // The last item may be short.
                        run_left = run_left > 1 ? run_left - 1 : 1;
                    } else {
                        // The signs, or all planes below them.
                        run_step = a.n_rows * row_bytes;
                        run_left = plane == 0 ? 1 : n_planes - 1;
                    }
                } else {
                    const int row_bytes = cut.n_cols * sizeof(T);
                    const T* row;
                    // Rows of two kinds in turn: a group of even stride keeps to one kind.
                    const bool pairs = next_phase == QKV || (next_phase == MLP && w.rows == ALL);
                    run_step = (pairs ? n_groups / 2 : n_groups) * row_bytes;
                    if (next_phase == QKV) {
                        row = qkv_row(w, i);
                        const int half = a.head_dim / 2;
                        const int pair = share(QKV).begin + i / 2;
                        const int to_end = (head_of(pair) + 1) * half - pair;
                        run_left = min(run_left, (to_end + n_groups / 2 - 1) / max(1, n_groups / 2));
                    } else if (next_phase == OUT) {
                        row = static_cast<const T*>(w.w_o) + static_cast<int64_t>(share(OUT).begin + i) * cut.n_cols;
                    } else if (next_phase == MLP) {
                        row = mlp_row(w, i);
                    } else {
                        row = static_cast<const T*>(a.lm_head) +
                              static_cast<int64_t>(share(HEAD).begin + i) * cut.n_cols;
                    }
                    if (pairs && n_groups == 1) {
                        run_left = 1;
                    }
                    run_granules = segment_granules(cut);
                    from = reinterpret_cast<const char*>(row) + (warp_id() & (cut.n_segs - 1)) * cut.granules * 16;
                }
                run_from = from + lane_id() * 16;
                next_item += run_left;
                return;
            }
            if (next_phase == MLP && next_layer >= last_layer && a.layers[next_layer].rows != ALL) {
                return;
            }
            next_item = 0;
            if (next_phase == MLP && next_layer + 1 < a.n_layers) {
                next_layer++;
                next_phase = QKV;
            } else {
                next_phase++;
            }
        }
    }

    __device__ __forceinline__ static uint64_t* arrivals() {
        __shared__ uint64_t all[DECODE_WARPS * SLOTS_MAX];
        return all + warp_id() * SLOTS_MAX;
    }

    __device__ __forceinline__ void init_ring() const {
#if __CUDA_ARCH__ >= 900
        if (lane_id() == 0) {
            for (int i = 0; i < a.n_slots; i++) {
                init_barrier(arrivals() + i, 1);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
        __syncwarp();
#endif
    }

    // Asks for an item of n granules, of which this lane's first is at from. A slot has to be free. On sm_90 and later an
    // item is one bulk copy that one lane asks for, and a barrier of each slot tells of its arrival; before, it is a group
    // of copies of 16 bytes, and groups are counted.
    __device__ __forceinline__ void ask_item(const char* from, int n_granules) {
        uint4* to = ring() + ask_slot * (a.slot_bytes / 16);
#if __CUDA_ARCH__ >= 900
        if (lane_id() == 0) {
            uint64_t* arrival = arrivals() + ask_slot;
            expect_bytes(arrival, n_granules * 16);
            if (n_granules > 0) {
                copy_bulk(to, from, n_granules * 16, arrival);
            }
        }
#else
#pragma unroll
        for (int k = 0; k < ITEM_LOADS; k++) {
            if (lane_id() + k * WARP < n_granules) {
                copy_async(to + lane_id() + k * WARP, from + k * WARP * 16, true);
            }
        }
        commit_copies();
#endif
        n_owed--;
        ask_slot = ask_slot + 1 == a.n_slots ? 0 : ask_slot + 1;
    }

    // Asks for this warp's next items, as many as slots are free, as far as they are to be asked for yet.
    __device__ __forceinline__ void ask_owed() {
#pragma unroll 1
        while (n_owed > 0 && !at_last) {
            if (run_left == 0) {
                find_run();
                at_last = run_left == 0;
                continue;
            }
            ask_item(run_from, run_granules);
            run_from += run_step;
            run_left--;
        }
    }

    // Asks for what is owed, up to the chosen rows of the layer.
    __device__ __forceinline__ void pay(int layer) {
        last_layer = layer;
        at_last = false;
        ask_owed();
    }

    // The next item of this warp, arrived. free_slot() frees it.
    __device__ __forceinline__ const uint4* arrived() const {
#if __CUDA_ARCH__ >= 900
        wait_at(arrivals() + slot, parity);
#else
        wait_copies_below(a.n_slots - n_owed);
        __syncwarp();
#endif
        return ring() + slot * (a.slot_bytes / 16);
    }

    __device__ __forceinline__ void free_slot() {
        __syncwarp();
        slot++;
        if (slot == a.n_slots) {
            slot = 0;
            parity ^= 1;
        }
        n_owed++;
    }

    // 16-byte pieces of this warp's segment.
    __device__ __forceinline__ int segment_granules(const ItemCut& cut) const {
        const int seg = (warp_id() & (cut.n_segs - 1));
        return max(0, min(cut.granules, cut.n_cols / PER_LOAD<T> - seg * cut.granules));
    }

    // This lane's part of this warp's segment of the vector.
    struct Segment {
        float x[ITEM_LOADS][PER_LOAD<T>];
        int n_granules;

        __device__ __forceinline__ void add(int k, uint4 raw, float (&sums)[4]) const {
            float w[PER_LOAD<T>];
            unpack<T>(raw, w);
#pragma unroll
            for (int j = 0; j < PER_LOAD<T>; j++) {
                sums[j % 4] = fmaf(w[j], x[k][j], sums[j % 4]);
            }
        }
    };

    // This warp's segment of vec.
    __device__ __forceinline__ Segment segment_of(const ItemCut& cut) const {
        Segment s;
        s.n_granules = segment_granules(cut);
        const float* from = vec() + (warp_id() & (cut.n_segs - 1)) * cut.granules * PER_LOAD<T>;
#pragma unroll
        for (int k = 0; k < ITEM_LOADS; k++) {
            const int granule = lane_id() + k * WARP;
#pragma unroll
            for (int j = 0; j < PER_LOAD<T>; j += 4) {
                float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (granule < s.n_granules) {
                    v = *reinterpret_cast<const float4*>(from + granule * PER_LOAD<T> + j);
                }
                s.x[k][j] = v.x;
                s.x[k][j + 1] = v.y;
                s.x[k][j + 2] = v.z;
                s.x[k][j + 3] = v.w;
            }
        }
        return s;
    }

    // This lane's part of an item of N loads. All of it is on its way from shared memory before the first product.
    template <int N>
    __device__ __forceinline__ static float multiply(const Segment& s, const uint4* item) {
        uint4 raw[N];
#pragma unroll
        for (int k = 0; k < N; k++) {
            const int granule = lane_id() + k * WARP;
            raw[k] = granule < s.n_granules ? item[granule] : make_uint4(0, 0, 0, 0);
        }
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < N; k++) {
            s.add(k, raw[k], sums);
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // This lane's part of the item that arrives next, which frees its slot.
    __device__ __forceinline__ float multiply_next(const Segment& s, int n_loads) {
        const uint4* item = arrived();
        float sum;
        if (n_loads > 6) {
            sum = multiply<8>(s, item);
        } else if (n_loads > 4) {
            sum = multiply<6>(s, item);
        } else if (n_loads > 2) {
            sum = multiply<4>(s, item);
        } else {
            sum = multiply<2>(s, item);
        }
        free_slot();
        return sum;
    }

    // tile[(i - first) * n_segs + seg] = segment seg of row i, for the rows first..end of a phase, as the ring brings them.
    __device__ __forceinline__ void ring_rows(const ItemCut& cut, const Segment& s, int first, int end) {
        const int seg = (warp_id() & (cut.n_segs - 1));
        const int n_groups = (DECODE_WARPS >> cut.seg_bits);
        const int n_loads = (cut.granules + WARP - 1) / WARP;
#pragma unroll 1
        for (int i = first + (warp_id() >> cut.seg_bits); i < end; i += n_groups) {
            float sum = multiply_next(s, n_loads);
            ask_owed();
            sum = warp_sum(sum);
            if (lane_id() == 0) {
                tile()[(i - first) * cut.n_segs + seg] = sum;
            }
        }
    }

    // The same for rows first..end of a list. The ring is empty before and after: as many rows as it holds are on their way
    // at once.
    __device__ __forceinline__ void listed_rows(
        const ItemCut& cut, const Segment& s, int first, int end, const T* matrix, const int* list
    ) {
        const int seg = (warp_id() & (cut.n_segs - 1));
        const int n_groups = (DECODE_WARPS >> cut.seg_bits);
        const int n_loads = (cut.granules + WARP - 1) / WARP;
        const T* segments = matrix + (seg * cut.granules + lane_id()) * PER_LOAD<T>;
        int asked = first + (warp_id() >> cut.seg_bits);
#pragma unroll 1
        for (int i = asked; i < end; i += n_groups) {
#pragma unroll 1
            for (; n_owed > 0 && asked < end; asked += n_groups) {
                const T* row = segments + static_cast<int64_t>(list[asked]) * cut.n_cols;
                ask_item(reinterpret_cast<const char*>(row), s.n_granules);
            }
            const float sum = warp_sum(multiply_next(s, n_loads));
            if (lane_id() == 0) {
                tile()[(i - first) * cut.n_segs + seg] = sum;
            }
        }
    }

    __device__ __forceinline__ float tile_row(const ItemCut& cut, int i) const {
        float total = 0.0f;
#pragma unroll 1
        for (int seg = 0; seg < cut.n_segs; seg++) {
            total += tile()[i * cut.n_segs + seg];
        }
        return total;
    }

    // Rows of a tile: whole rounds of all groups, an even number of rows.
    __device__ __forceinline__ int tile_rows(const ItemCut& cut) const {
        // A power of two for powers of two.
        return (a.tile_floats >> cut.seg_bits) & -(2 * DECODE_WARPS >> cut.seg_bits);
    }

    // A barrier of the grid in two halves; what every block wrote before arrive() is seen by all after wait().
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.sync) : "memory");
        }
        barriers++;
    }

    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0) {
            const uint32_t wanted = arrivals_before + barriers * gridDim.x;
            uint32_t arrivals;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrivals) : "l"(a.sync) : "memory");
            } while (static_cast<int32_t>(arrivals - wanted) < 0);
        }
        __syncthreads();
    }

    // Asks L2 for a norm's weights, a line for each thread.
    __device__ __forceinline__ void ask_norm(const float* norm) const {
        for (int col = threadIdx.x * 32; col < a.cut_d.n_cols; col += DECODE_THREADS * 32) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + col));
        }
    }

    static __device__ __forceinline__ float4 add(float4 v, float4 w) {
        return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
    }

    static __device__ __forceinline__ float4 scaled(float4 v, float f) {
        return make_float4(v.x * f, v.y * f, v.z * f, v.w * f);
    }

    // vec = rmsnorm(x) for x = the embedding of token, or x_out and the first n_parts parts of the down projection; x
    // itself goes to the residual with keep, the signs of vec to x_signs. Ends past a barrier of the block.
    __device__ __forceinline__ void normalise(const float* norm, bool embed, uint32_t token, int n_parts, bool keep) {
        const int d = a.cut_d.n_cols;
        float4 x[VEC_LOADS];
        float4 weight[VEC_LOADS];
        float square = 0.0f;
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = (threadIdx.x + k * DECODE_THREADS) * 4;
            x[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            weight[k] = x[k];
            if (col < d) {
                weight[k] = __ldg(reinterpret_cast<const float4*>(norm + col));
                if (embed) {
                    const T* row = static_cast<const T*>(a.embedding) + static_cast<int64_t>(token) * d + col;
                    x[k] = make_float4(to_f32(row[0]), to_f32(row[1]), to_f32(row[2]), to_f32(row[3]));
                } else {
                    x[k] = __ldcg(reinterpret_cast<const float4*>(a.x_out + col));
                }
            }
        }
#pragma unroll 1
        for (int part = 0; part < n_parts; part += 2) {
            float4 parts[2][VEC_LOADS];
#pragma unroll
            for (int k = 0; k < 2 * VEC_LOADS; k++) {
                const int col = (threadIdx.x + k / 2 * DECODE_THREADS) * 4;
                parts[k % 2][k / 2] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (col < d && part + k % 2 < n_parts) {
                    const float* from = a.down_parts + static_cast<int64_t>(part + k % 2) * d + col;
                    parts[k % 2][k / 2] = __ldcg(reinterpret_cast<const float4*>(from));
                }
            }
#pragma unroll
            for (int k = 0; k < VEC_LOADS; k++) {
                x[k] = add(add(x[k], parts[0][k]), parts[1][k]);
            }
        }
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            square += (x[k].x * x[k].x + x[k].y * x[k].y) + (x[k].z * x[k].z + x[k].w * x[k].w);
        }
        const float scale = rsqrtf(block_sum(square, scratch()) / d + a.eps);
#pragma unroll
        for (int k = 0; k < VEC_LOADS; k++) {
            const int col = (threadIdx.x + k * DECODE_THREADS) * 4;
            const float4 n = make_float4(
                x[k].x * scale * weight[k].x, x[k].y * scale * weight[k].y, x[k].z * scale * weight[k].z,
                x[k].w * scale * weight[k].w
            );
            // Eight lanes hold the 32 columns of a word.
            const uint32_t bits = (n.x < 0.0f) | (n.y < 0.0f) << 1 | (n.z < 0.0f) << 2 | (n.w < 0.0f) << 3;
            uint32_t word = bits << lane_id() % 8 * 4;
            word |= __shfl_xor_sync(0xffffffffu, word, 1);
            word |= __shfl_xor_sync(0xffffffffu, word, 2);
            word |= __shfl_xor_sync(0xffffffffu, word, 4);
            if (col < d) {
                *reinterpret_cast<float4*>(vec() + col) = n;
                if (keep) {
                    *reinterpret_cast<float4*>(residual() + col) = x[k];
                }
                if (lane_id() % 8 == 0) {
                    x_signs()[col / WARP] = word;
                }
            }
        }
        __syncthreads();
    }

    // Rows first..end of the queries, keys and values, in the tile: rotated, to q and to the cache.
    __device__ __forceinline__ void store_qkv(const DecodeLayer& w, int position, int first, int end) {
        const int half = a.head_dim / 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < (end - first) / 2; i += DECODE_THREADS) {
            const int pair = share(QKV).begin + first / 2 + i;
            int head = head_of(pair);
            const int dim = pair - head * half;
            float one = tile_row(a.cut_d, 2 * i);
            float two = tile_row(a.cut_d, 2 * i + 1);
            if (head < a.n_heads + a.n_kv_heads) {
                const float c = __ldg(a.cos + static_cast<int64_t>(position) * half + dim);
                const float sn = __ldg(a.sin + static_cast<int64_t>(position) * half + dim);
                const float rotated = one * c - two * sn;
                two = two * c + one * sn;
                one = rotated;
            }
            if (head < a.n_heads) {
                a.q[head * a.head_dim + dim] = one;
                a.q[head * a.head_dim + dim + half] = two;
            } else {
                head -= a.n_heads;
                CacheType* cache = static_cast<CacheType*>(w.keys);
                if (head >= a.n_kv_heads) {
                    head -= a.n_kv_heads;
                    cache = static_cast<CacheType*>(w.values);
                }
                cache += (static_cast<int64_t>(head) * a.n_positions_max + position) * a.head_dim + dim;
                from_f32(one, cache[0]);
                from_f32(two, cache[half]);
            }
        }
    }

    using CacheType = std::conditional_t<sizeof(T) == 4, float, __half>;
    static constexpr int KV_LOADS = KV_DIMS / PER_LOAD<CacheType>;

    // Keys and values of the positions of one round of a warp.
    struct Positions {
        uint4 keys[KV_IN_FLIGHT][KV_LOADS];
        uint4 values[KV_IN_FLIGHT][KV_LOADS];
    };

    // Loads those of the positions from first on, in steps of a round of the block, that lie before end; zeros else.
    __device__ __forceinline__ void load_positions(
        const DecodeLayer& w, int kv_head, int first, int end, Positions& p
    ) const {
        const int at_once = WARP / a.head_lanes;
        const int dim = lane_id() % a.head_lanes * KV_DIMS;
        int position = dim < a.head_dim ? first + warp_id() * at_once + lane_id() / a.head_lanes : end;
        const int64_t at = (static_cast<int64_t>(kv_head) * a.n_positions_max + position) * a.head_dim + dim;
        const CacheType* keys = static_cast<const CacheType*>(w.keys) + at;
        const CacheType* values = static_cast<const CacheType*>(w.values) + at;
        const int step = DECODE_WARPS * at_once;
#pragma unroll
        for (int j = 0; j < KV_IN_FLIGHT; j++) {
#pragma unroll
            for (int i = 0; i < KV_LOADS; i++) {
                p.keys[j][i] = make_uint4(0, 0, 0, 0);
                p.values[j][i] = make_uint4(0, 0, 0, 0);
                if (position < end) {
                    p.keys[j][i] = __ldcg(reinterpret_cast<const uint4*>(keys) + i);
                    p.values[j][i] = __ldcg(reinterpret_cast<const uint4*>(values) + i);
                }
            }
            position += step;
            keys += step * a.head_dim;
            values += step * a.head_dim;
        }
    }

    __device__ __forceinline__ int n_splits(int n_positions) const {
        return min(a.n_splits_max, (n_positions + SPLIT_POSITIONS - 1) / SPLIT_POSITIONS);
    }

    // Waits for the grid in between: keys and values of earlier positions are asked for before.
    __device__ __forceinline__ void attention(int layer, int position) {
        const DecodeLayer& w = a.layers[layer];
        const int n_positions = position + 1;
        const int splits = n_splits(n_positions);
        const int chunk = (n_positions + splits - 1) / splits;
        const int group = a.n_heads / a.n_kv_heads;
        const int lanes = a.head_lanes;
        const int at_once = WARP / lanes;
        const int round = DECODE_WARPS * at_once * KV_IN_FLIGHT;
        const int dim = lane_id() % lanes * KV_DIMS;
        float* warp_sums = vec();                                             // (warps, head_dim)
        float* warp_maxima = vec() + DECODE_WARPS * a.head_lanes * KV_DIMS;   // (warps, 2)
        bool waited = false;
#pragma unroll 1
        for (int task = blockIdx.x; task < a.n_kv_heads * splits || !waited; task += gridDim.x) {
            const bool works = task < a.n_kv_heads * splits;
            const int kv_head = works ? task / splits : 0;
            const int split = task - kv_head * splits;
            const int begin = works ? split * chunk : 0;
            const int end = works ? min(begin + chunk, n_positions) : 0;
            if (!works) {
                wait();
                mark(WAIT_QKV);
                return;
            }
#pragma unroll 1
            for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                float q[KV_DIMS] = {};
                bool has_q = false;
                float sums[KV_DIMS] = {};
                float maximum = -INFINITY;
                float total = 0.0f;
#pragma unroll 1
                for (int first = begin; first < end; first += round) {
                    Positions p;
                    load_positions(w, kv_head, first, waited ? end : min(end, position), p);
                    if (!waited) {
                        wait();
                        mark(WAIT_QKV);
                        waited = true;
                        if (end > position && first + round > position) {
                            // The token's own key and value have come meanwhile.
                            first -= round;
                            continue;
                        }
                    }
                    if (!has_q && dim < a.head_dim) {
#pragma unroll
                        for (int i = 0; i < KV_DIMS; i += 4) {
                            const float* from = a.q + head * a.head_dim + dim + i;
                            const float4 v = scaled(__ldcg(reinterpret_cast<const float4*>(from)), a.scale);
                            q[i] = v.x;
                            q[i + 1] = v.y;
                            q[i + 2] = v.z;
                            q[i + 3] = v.w;
                        }
                    }
                    has_q = true;
                    float scores[KV_IN_FLIGHT];
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        scores[j] = 0.0f;
#pragma unroll
                        for (int i = 0; i < KV_LOADS; i++) {
                            float k[PER_LOAD<CacheType>];
                            unpack<CacheType>(p.keys[j][i], k);
#pragma unroll
                            for (int e = 0; e < PER_LOAD<CacheType>; e++) {
                                scores[j] = fmaf(q[i * PER_LOAD<CacheType> + e], k[e], scores[j]);
                            }
                        }
                    }
                    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
                        for (int j = 0; j < KV_IN_FLIGHT; j++) {
                            scores[j] += __shfl_xor_sync(0xffffffffu, scores[j], offset);
                        }
                    }
                    float larger = maximum;
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        const int at = first + (j * DECODE_WARPS + warp_id()) * at_once + lane_id() / lanes;
                        scores[j] = at < end ? scores[j] : -INFINITY;
                        larger = fmaxf(larger, scores[j]);
                    }
                    const float factor = rescale(maximum, larger);
                    maximum = larger;
                    total *= factor;
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        sums[i] *= factor;
                    }
#pragma unroll
                    for (int j = 0; j < KV_IN_FLIGHT; j++) {
                        if (scores[j] == -INFINITY) {
                            continue;
                        }
                        const float weight = exp2f(scores[j] - larger);
                        total += weight;
#pragma unroll
                        for (int i = 0; i < KV_LOADS; i++) {
                            float v[PER_LOAD<CacheType>];
                            unpack<CacheType>(p.values[j][i], v);
#pragma unroll
                            for (int e = 0; e < PER_LOAD<CacheType>; e++) {
                                sums[i * PER_LOAD<CacheType> + e] =
                                    fmaf(weight, v[e], sums[i * PER_LOAD<CacheType> + e]);
                            }
                        }
                    }
                }
                // The positions that the lanes of a warp hold side by side, then the warps.
                float larger = maximum;
                for (int offset = lanes; offset < WARP; offset *= 2) {
                    larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, offset));
                }
                const float factor = rescale(maximum, larger);
                total *= factor;
#pragma unroll
                for (int i = 0; i < KV_DIMS; i++) {
                    sums[i] *= factor;
                }
                for (int offset = lanes; offset < WARP; offset *= 2) {
                    total += __shfl_xor_sync(0xffffffffu, total, offset);
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], offset);
                    }
                }
                if (lane_id() < lanes && dim < a.head_dim) {
#pragma unroll
                    for (int i = 0; i < KV_DIMS; i++) {
                        warp_sums[warp_id() * a.head_dim + dim + i] = sums[i];
                    }
                }
                if (lane_id() == 0) {
                    warp_maxima[2 * warp_id()] = larger;
                    warp_maxima[2 * warp_id() + 1] = total;
                }
                __syncthreads();
                for (int d = threadIdx.x; d < a.head_dim; d += DECODE_THREADS) {
                    float most = -INFINITY;
#pragma unroll
                    for (int warp = 0; warp < DECODE_WARPS; warp++) {
                        most = fmaxf(most, warp_maxima[2 * warp]);
                    }
                    float sum = 0.0f;
                    float all = 0.0f;
#pragma unroll
                    for (int warp = 0; warp < DECODE_WARPS; warp++) {
                        const float f = rescale(warp_maxima[2 * warp], most);
                        // A warp without positions left its sums zero.
                        sum = fmaf(f, warp_sums[warp * a.head_dim + d], sum);
                        all = fmaf(f, warp_maxima[2 * warp + 1], all);
                    }
                    const int64_t at = static_cast<int64_t>(head) * a.n_splits_max + split;
                    __stcg(a.part_sums + at * a.head_dim + d, sum);
                    if (d == 0) {
                        __stcg(a.part_maxima + 2 * at, most);
                        __stcg(a.part_maxima + 2 * at + 1, all);
                    }
                }
                __syncthreads();
            }
        }
    }

    // vec = the chunks of attention, merged. Ends past a barrier of the block.
    __device__ __forceinline__ void merge_attention(int position) {
        const int splits = n_splits(position + 1);
        const int n_cols = a.cut_q.n_cols;
#pragma unroll 1
        for (int base = threadIdx.x * 4; base < n_cols; base += MERGE_COLS * DECODE_THREADS * 4) {
            float maximum[MERGE_COLS];
            float all[MERGE_COLS] = {};
            float4 sum[MERGE_COLS];
#pragma unroll
            for (int c = 0; c < MERGE_COLS; c++) {
                maximum[c] = -INFINITY;
                sum[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
#pragma unroll 1
            for (int from = 0; from < splits; from += MERGE_SPLITS) {
                float2 part[MERGE_COLS][MERGE_SPLITS];
                float4 value[MERGE_COLS][MERGE_SPLITS];
#pragma unroll
                for (int c = 0; c < MERGE_COLS; c++) {
                    const int i = min(base + c * DECODE_THREADS * 4, n_cols - 4);
                    const int head = __float2int_rd((static_cast<float>(i) + 0.5f) * 0.5f * a.heads_per_pair);
                    const int d = i - head * a.head_dim;
#pragma unroll
                    for (int s = 0; s < MERGE_SPLITS; s++) {
                        const int at = head * a.n_splits_max + min(from + s, splits - 1);
                        part[c][s] = __ldcg(reinterpret_cast<const float2*>(a.part_maxima) + at);
                        value[c][s] = __ldcg(reinterpret_cast<const float4*>(a.part_sums + at * a.head_dim + d));
                    }
                }
#pragma unroll
                for (int c = 0; c < MERGE_COLS; c++) {
                    float larger = maximum[c];
#pragma unroll
                    for (int s = 0; s < MERGE_SPLITS; s++) {
                        larger = fmaxf(larger, part[c][s].x);
                    }
                    const float factor = rescale(maximum[c], larger);
                    maximum[c] = larger;
                    all[c] *= factor;
                    sum[c] = scaled(sum[c], factor);
#pragma unroll
                    for (int s = 0; s < MERGE_SPLITS; s++) {
                        const float f = from + s < splits ? rescale(part[c][s].x, larger) : 0.0f;
                        sum[c] = add(sum[c], scaled(value[c][s], f));
                        all[c] = fmaf(f, part[c][s].y, all[c]);
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < MERGE_COLS; c++) {
                const int i = base + c * DECODE_THREADS * 4;
                if (i < n_cols) {
                    *reinterpret_cast<float4*>(vec() + i) = scaled(sum[c], 1.0f / all[c]);
                }
            }
        }
        __syncthreads();
    }

    // kept += the rows of lanes that keep theirs.
    __device__ __forceinline__ void keep_rows(bool keep, int row, int* n_kept) const {
        const uint32_t found = __ballot_sync(0xffffffffu, keep);
        int at = 0;
        if (lane_id() == 0) {
            at = atomicAdd(n_kept, __popc(found));
        }
        at = __shfl_sync(0xffffffffu, at, 0);
        if (keep) {
            kept()[at + __popc(found & ((1u << lane_id()) - 1))] = row;
        }
    }

    // vec in 8 bits to x_planes; returns its scale. Ends past a barrier of the block.
    __device__ __forceinline__ float quantise_vec() const {
        const float scale = quantise(n_words(), x_planes(), reinterpret_cast<uint32_t*>(scratch()), [&](int col) {
            return col < a.cut_d.n_cols ? *reinterpret_cast<const float4*>(vec() + col)
                                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        });
        __syncthreads();
        return scale;
    }

    // kept = the block's rows whose score passes the threshold; x_scale is that of x_planes.
    __device__ __forceinline__ void predict_scores(const DecodeLayer& w, int n, float x_scale, int* n_kept) {
        const int begin = share(MLP).begin;
        const bool ringed = a.sign_rows > 0;
        const int per_item = ringed ? a.sign_rows : SCORE_ROWS;
        const int words = n_words();
#pragma unroll 1
        for (int item = warp_id(); item * per_item < n; item += DECODE_WARPS) {
            const int first = item * per_item;
            const int n_rows = min(per_item, n - first);
            // Four lanes share a row; the last row stands in for those that are not there.
            const int i = min(lane_id() / 4, n_rows - 1);
            int score;
            if (ringed) {
                ScoreCounts counts;
#pragma unroll 1
                for (uint32_t plane = 0; plane < w.n_planes; plane++) {
                    const uint4* row = arrived() + i * (words / 4);
                    counts.add_plane(words, x_planes(), [&](int word) { return row[word / 4]; });
                    free_slot();
                    ask_owed();
                }
                score = counts.score();
            } else {
                const BitRows rows = {w.signs, w.low, static_cast<int>(w.n_planes), a.n_rows, words};
                score = rows.score(begin + first + i, x_planes());
            }
            bool keep = lane_id() % 4 == 0 && lane_id() / 4 < n_rows;
            if (keep) {
                keep = is_kept(score, limit_of(w.limits, w.limit, begin + first + i), x_scale);
            }
            keep_rows(keep, first + i, n_kept);
        }
    }

    // kept = the block's rows whose signs pass the limit. A warp counts eight rows side by side; its lanes hold words.
    __device__ __forceinline__ void predict(const DecodeLayer& w, int n, int* n_kept) {
        const int begin = share(MLP).begin;
        const bool ringed = a.sign_rows > 0;
        const int per_item = ringed ? a.sign_rows : SIGN_ROWS;
        const int words = n_words();
#pragma unroll 1
        for (int item = warp_id(); item * per_item < n; item += DECODE_WARPS) {
            const int first = item * per_item;
            const int n_rows = min(per_item, n - first);
            const uint32_t* rows = ringed ? reinterpret_cast<const uint32_t*>(arrived())
                                          : w.signs + static_cast<int64_t>(begin + first) * words;
            uint32_t counts[SIGN_ROWS] = {};
#pragma unroll 1
            for (int word = lane_id(); word < words; word += WARP) {
                const uint32_t x = x_signs()[word];
#pragma unroll
                for (int r = 0; r < SIGN_ROWS; r++) {
                    counts[r] += __popc(rows[min(r, n_rows - 1) * words + word] ^ x);
                }
            }
            uint32_t mine = 0;
#pragma unroll
            for (int r = 0; r < SIGN_ROWS; r++) {
                const uint32_t count = __reduce_add_sync(0xffffffffu, counts[r]);
                mine = lane_id() == r ? count : mine;
            }
            const int row = first + lane_id();
            bool keep = lane_id() < n_rows;
            if (keep) {
                keep = mine <= limit_of(w.limits, w.limit, begin + row);
            }
            keep_rows(keep, row, n_kept);
            if (ringed) {
                free_slot();
                ask_owed();
            }
        }
    }

    // Empties the lists of rows; needs a barrier of the block.
    __device__ __forceinline__ void clear_lists(const DecodeLayer& w, int* n_kept, int* n_active) {
        const int n = share(MLP).count;
        if (threadIdx.x == 0) {
            *n_kept = w.rows == PREDICTED ? 0 : n;
            *n_active = 0;
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += DECODE_THREADS) {
            h_rows()[i] = 0.0f;
        }
    }

    // The gate of row i, row in_tile of the tile. A row becomes active in any order: that changes which warp multiplies
    // it, not how.
    __device__ __forceinline__ void activate_row(int i, int in_tile, int* n_active) {
        const float gate = activate(a.activation, a.threshold, tile_row(a.cut_d, in_tile));
        if (gate != 0.0f) {
            h_rows()[i] = gate;
            active()[atomicAdd(n_active, 1)] = i;
        }
    }

    // Rows first..end of the gate, or of gate and up in turn, in the tile.
    __device__ __forceinline__ void store_gates(const DecodeLayer& w, int first, int end, int* n_active) {
        if (w.rows == ALL) {
#pragma unroll 1
            for (int i = threadIdx.x; i < (end - first) / 2; i += DECODE_THREADS) {
                const float gate = activate(a.activation, a.threshold, tile_row(a.cut_d, 2 * i));
                h_rows()[first / 2 + i] = gate * tile_row(a.cut_d, 2 * i + 1);
                if (gate != 0.0f) {
                    atomicAdd(n_active, 1);
                }
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < end - first; i += DECODE_THREADS) {
                activate_row(first + i, i, n_active);
            }
        }
    }

    // What the ring does not bring: kept rows of the gate, active rows of up. Then h is whole.
    __device__ __forceinline__ void sparse_rows(
        int layer, const Segment& s, const int* n_kept, int* n_active
    ) {
        const DecodeLayer& w = a.layers[layer];
        const int begin = share(MLP).begin;
        const int n = share(MLP).count;
        const int step = tile_rows(a.cut_d);
#pragma unroll 1
        for (int pass = w.rows == PREDICTED ? 0 : w.rows == ACTIVE ? 1 : 2; pass < 2; pass++) {
            const void* weights = pass == 0 ? w.w_gate : w.w_up;
            const T* matrix = static_cast<const T*>(weights) + static_cast<int64_t>(begin) * a.cut_d.n_cols;
            const int* list = pass == 0 ? kept() : active();
            const int n_listed = pass == 0 ? *n_kept : *n_active;
#pragma unroll 1
            for (int first = 0; first < n_listed; first += step) {
                const int end = min(first + step, n_listed);
                listed_rows(a.cut_d, s, first, end, matrix, list);
                __syncthreads();
#pragma unroll 1
                for (int i = threadIdx.x; i < end - first; i += DECODE_THREADS) {
                    if (pass == 0) {
                        activate_row(list[first + i], i, n_active);
                    } else {
                        h_rows()[list[first + i]] *= tile_row(a.cut_d, i);
                    }
                }
                __syncthreads();
            }
            mark(pass == 0 ? GATE : UP);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += DECODE_THREADS) {
            __stcg(a.h + begin + i, h_rows()[i]);
        }
        if (threadIdx.x == 0) {
            atomicAdd(a.counts + 2 * layer, static_cast<unsigned long long>(*n_kept));
            atomicAdd(a.counts + 2 * layer + 1, static_cast<unsigned long long>(*n_active));
        }
    }

    // down_parts[chunk] = sum over the chunk's rows of h[i] * w_down_t[i].
    __device__ __forceinline__ void down(int layer) {
        const DecodeLayer& w = a.layers[layer];
        const int d = a.cut_d.n_cols;
        constexpr int COLS = DOWN_LANES * PER_LOAD<T>;
        const int n_col_chunks = (d + COLS - 1) / COLS;
        float* warp_sums = vec();  // (warps, COLS)
        int* queue_rows = reinterpret_cast<int*>(vec() + DECODE_WARPS * COLS) + warp_id() * DOWN_QUEUE;
        float* queue_h = vec() + DECODE_WARPS * (COLS + DOWN_QUEUE) + warp_id() * DOWN_QUEUE;
        const int half = lane_id() / DOWN_LANES;
#pragma unroll 1
        for (int task = blockIdx.x; task < n_col_chunks * a.n_chunks; task += gridDim.x) {
            const int chunk = task / n_col_chunks;
            const int col = (task - chunk * n_col_chunks) * COLS + lane_id() % DOWN_LANES * PER_LOAD<T>;
            const T* weights = static_cast<const T*>(w.w_down_t) + col;
            const int chunk_begin = share_begin(a.n_rows, chunk, a.n_chunks);
            const int chunk_rows = share_begin(a.n_rows, chunk + 1, a.n_chunks) - chunk_begin;
            const int begin = chunk_begin + share_begin(chunk_rows, warp_id(), DECODE_WARPS);
            const int end = chunk_begin + share_begin(chunk_rows, warp_id() + 1, DECODE_WARPS);
            float sums[PER_LOAD<T>] = {};
            int n_queued = 0;
            // h of the rows from base on, a row for each lane; those that follow are in flight.
            float h[H_IN_FLIGHT] = {};
            int base = begin;
            int n_loaded = 0;
#pragma unroll 1
            while (true) {
                // The queue takes rows until it holds a round, or there are none left.
#pragma unroll 1
                while (n_queued < DOWN_ROUND && base < end) {
                    if (n_loaded == 0) {
#pragma unroll
                        for (int k = 0; k < H_IN_FLIGHT; k++) {
                            const int row = base + k * WARP + lane_id();
                            h[k] = row < end ? __ldcg(a.h + row) : 0.0f;
                        }
                        n_loaded = H_IN_FLIGHT;
                    }
                    const int row = base + lane_id();
                    const float value = h[0];
#pragma unroll
                    for (int k = 1; k < H_IN_FLIGHT; k++) {
                        h[k - 1] = h[k];
                    }
                    n_loaded--;
                    base += WARP;
                    const bool counts = row < end && (w.rows == ALL || value != 0.0f);
                    const uint32_t found = __ballot_sync(0xffffffffu, counts);
                    if (counts) {
                        const int at = n_queued + __popc(found & ((1u << lane_id()) - 1));
                        queue_rows[at] = row;
                        queue_h[at] = value;
                    }
                    n_queued += __popc(found);
                }
                __syncwarp();
                if (n_queued == 0) {
                    break;
                }
                // A round of the queue's rows, two at a time side by side.
                uint4 raw[DOWN_IN_FLIGHT];
#pragma unroll
                for (int k = 0; k < DOWN_IN_FLIGHT; k++) {
                    const int at = 2 * k + half;
                    raw[k] = make_uint4(0, 0, 0, 0);
                    if (at < n_queued && col < d) {
                        raw[k] = load_weights(weights + static_cast<int64_t>(queue_rows[at]) * d);
                    }
                }
#pragma unroll
                for (int k = 0; k < DOWN_IN_FLIGHT; k++) {
                    const int at = 2 * k + half;
                    const float value = at < n_queued ? queue_h[at] : 0.0f;
                    float v[PER_LOAD<T>];
                    unpack<T>(raw[k], v);
#pragma unroll
                    for (int j = 0; j < PER_LOAD<T>; j++) {
                        sums[j] = fmaf(value, v[j], sums[j]);
                    }
                }
                __syncwarp();
                // What is left, less than a warp of rows, moves up.
                n_queued = max(0, n_queued - DOWN_ROUND);
                int left_row = 0;
                float left_h = 0.0f;
                if (lane_id() < n_queued) {
                    left_row = queue_rows[DOWN_ROUND + lane_id()];
                    left_h = queue_h[DOWN_ROUND + lane_id()];
                }
                __syncwarp();
                if (lane_id() < n_queued) {
                    queue_rows[lane_id()] = left_row;
                    queue_h[lane_id()] = left_h;
                }
            }
#pragma unroll
            for (int j = 0; j < PER_LOAD<T>; j++) {
                sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], DOWN_LANES);
                if (half == 0) {
                    warp_sums[warp_id() * COLS + lane_id() * PER_LOAD<T> + j] = sums[j];
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int c = threadIdx.x; c < COLS; c += DECODE_THREADS) {
                const int out = (task - chunk * n_col_chunks) * COLS + c;
                float sum = 0.0f;
#pragma unroll
                for (int warp = 0; warp < DECODE_WARPS; warp++) {
                    sum += warp_sums[warp * COLS + c];
                }
                if (out < d) {
                    __stcg(a.down_parts + static_cast<int64_t>(chunk) * d + out, sum);
                }
            }
            __syncthreads();
        }
    }

    // The larger logit, the smaller id among equals.
    static __device__ __forceinline__ void keep_better(float& best, int& id, float other, int other_id) {
        if (other > best || (other == best && other_id < id)) {
            best = other;
            id = other_id;
        }
    }

    // The best of a block on thread 0.
    __device__ __forceinline__ void block_best(float& best, int& id) {
        int* ids = reinterpret_cast<int*>(vec());
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, best, offset);
            keep_better(best, id, other, __shfl_xor_sync(0xffffffffu, id, offset));
        }
        if (lane_id() == 0) {
            scratch()[warp_id()] = best;
            ids[warp_id()] = id;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < DECODE_WARPS; warp++) {
                keep_better(best, id, scratch()[warp], ids[warp]);
            }
        }
    }

    // Block 0: the state of the next token.
    __device__ __forceinline__ void finish(uint32_t token, int position) {
        if (a.greedy) {
            float best = -INFINITY;
            int id = INT_MAX;
            for (int block = threadIdx.x; block < gridDim.x; block += DECODE_THREADS) {
                const float other = __uint_as_float(__ldcg(a.best + 2 * block));
                keep_better(best, id, other, static_cast<int>(__ldcg(a.best + 2 * block + 1)));
            }
            block_best(best, id);
            token = id;
        }
        if (threadIdx.x == 0) {
            if (position < a.n_ids) {
                a.ids[position] = token;
            }
            a.state->token = token;
            a.state->position = position + 1;
            a.sync[1] = arrivals_before + barriers * gridDim.x;
        }
    }
};

template <typename T>
__device__ __forceinline__ void decode(const DecodeArgs& a) {
    __shared__ int n_kept;
    __shared__ int n_active;

    Decoder<T> m(a);
    const uint32_t token = min(__ldcg(&a.state->token), static_cast<uint32_t>(a.vocab_size - 1));
    const int position = static_cast<int>(min(__ldcg(&a.state->position), static_cast<uint32_t>(a.n_positions_max - 1)));
    m.arrivals_before = __ldcg(a.sync + 1);
    m.start_marks();
    m.init_ring();
    m.make_shares();
    m.n_sign_items = a.sign_rows == 0 ? 0 : (m.share(MLP).count + a.sign_rows - 1) / a.sign_rows;
    m.n_owed = a.n_slots;
    m.pay(0);

    float best = -INFINITY;
    int id = INT_MAX;
    int phase = QKV;
    int layer = 0;
    // One loop over the phases that the ring feeds, so that its code is there once.
#pragma unroll 1
    while (true) {
        const DecodeLayer& w = a.layers[min(layer, a.n_layers - 1)];
        const ItemCut& cut = phase == OUT ? a.cut_q : a.cut_d;
        if (phase == OUT) {
            m.attention(layer, position);
            m.arrive();
            m.mark(ATTEND);
            m.wait();
            m.mark(WAIT_ATTEND);
            m.merge_attention(position);
            m.mark(MERGE);
        } else {
            const float* norm = phase == QKV ? w.attn_norm : phase == MLP ? w.mlp_norm : a.final_norm;
            if (phase == MLP) {
                m.clear_lists(w, &n_kept, &n_active);
            }
            const int n_parts = phase == MLP || layer == 0 ? 0 : a.n_chunks;
            m.normalise(norm, layer == 0 && phase == QKV, token, n_parts, phase == QKV);
            m.mark(phase == QKV ? NORM_QKV : phase == MLP ? NORM_MLP : NORM_HEAD);
        }
        const bool predicted = phase == MLP && w.rows == PREDICTED;
        const bool scored = predicted && w.n_planes > 0;
        const float x_scale = scored ? m.quantise_vec() : 0.0f;
        const typename Decoder<T>::Segment s = m.segment_of(cut);
        if (predicted) {
            if (scored) {
                m.predict_scores(w, m.share(MLP).count, x_scale, &n_kept);
            } else {
                m.predict(w, m.share(MLP).count, &n_kept);
            }
            __syncthreads();
            m.mark(PREDICT);
        }
        const int n = predicted ? 0 : m.n_items(layer, phase);
        const int step = m.tile_rows(cut);
#pragma unroll 1
        for (int first = 0; first < n; first += step) {
            const int end = min(first + step, n);
            m.ring_rows(cut, s, first, end);
            __syncthreads();
            if (phase == QKV) {
                m.store_qkv(w, position, first, end);
            } else if (phase == MLP) {
                m.store_gates(w, first, end, &n_active);
            } else {
                const int begin = m.share(phase).begin + first;
#pragma unroll 1
                for (int i = threadIdx.x; i < end - first; i += DECODE_THREADS) {
                    const float sum = m.tile_row(cut, i);
                    if (phase == OUT) {
                        __stcg(a.x_out + begin + i, m.residual()[begin + i] + sum);
                    } else {
                        a.logits[begin + i] = sum;
                        m.keep_better(best, id, sum, begin + i);
                    }
                }
            }
            __syncthreads();
        }
        m.mark(phase == QKV ? ROWS_QKV : phase == OUT ? ROWS_OUT : phase == MLP ? ROWS_MLP : ROWS_HEAD);
        if (phase == HEAD) {
            break;
        }
        if (phase == MLP) {
            m.sparse_rows(layer, s, &n_kept, &n_active);
        }
        m.arrive();
        if (phase == MLP) {
            // The next layer's first items come after all rows chosen here, and after this block's word that h is there.
            m.pay(layer + 1);
        }
        if (phase == QKV) {
            // attention() waits, when it has asked for the keys and values that are there already.
            phase = OUT;
            continue;
        }
        m.ask_norm(phase == OUT ? w.mlp_norm : layer + 1 < a.n_layers ? a.layers[layer + 1].attn_norm : a.final_norm);
        m.wait();
        m.mark(phase == OUT ? WAIT_OUT : WAIT_H);
        if (phase == OUT) {
            phase = MLP;
            continue;
        }
        m.down(layer);
        m.arrive();
        m.mark(DOWN);
        m.wait();
        m.mark(WAIT_DOWN);
        layer++;
        phase = layer < a.n_layers ? QKV : HEAD;
    }
    if (a.greedy) {
        m.block_best(best, id);
        if (threadIdx.x == 0) {
            __stcg(a.best + 2 * blockIdx.x, __float_as_uint(best));
            __stcg(a.best + 2 * blockIdx.x + 1, static_cast<uint32_t>(id));
        }
        m.arrive();
    }
    if (blockIdx.x == 0) {
        if (a.greedy) {
            m.wait();
        }
        m.finish(token, position);
    }
    m.mark(FINISH);
    m.store_marks();
}

extern "C" __global__ __launch_bounds__(DECODE_THREADS, 1) void decode_f32(const __grid_constant__ DecodeArgs a) {
    decode<float>(a);
}
extern "C" __global__ __launch_bounds__(DECODE_THREADS, 1) void decode_f16(const __grid_constant__ DecodeArgs a) {
    decode<__half>(a);
}
extern "C" __global__ __launch_bounds__(DECODE_THREADS, 1) void decode_bf16(const __grid_constant__ DecodeArgs a) {
    decode<__nv_bfloat16>(a);
}
