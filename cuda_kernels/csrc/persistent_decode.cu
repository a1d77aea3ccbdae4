// All layers of a decode step of a small model, and its head, in one launch; compiled by cuda_module.py (NVRTC).
//
// One block a multiprocessor, all resident (the launch is cooperative), goes through five phases a layer: norm and qkv;
// query-key norm, rope, cache write and attention; o and residual; norm, gate and up; down and residual. Then norm and
// head. Blocks meet at no barrier: two values travel in a word with the tag of their step and layer, and who needs them
// reads until the tag is there. A warp of its own streams the block's weight rows through a ring in shared memory, far
// ahead: it waits for room alone, so memory is busy while blocks wait for each other.
// Products: m16n8k16, 16 weight rows by 8 tokens, the eight other warps share the inner axis. The order of the inner
// axis within 32 values is one that makes every load of a lane 16 bytes; weights and tokens have the same.
// Rounding is that of the launches of torch_models/fused.py.
// Constants from outside: D width, NH heads, KVH KV heads, H head size, F ffn width, V vocabulary, QK_NORM, SLOTS of
// the ring, LAYERS, PAGE. Letters: T tokens, at most 8, G query heads of a KV head.

#include "device.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32;  // that compute; one more warp streams
constexpr int KW = 1024;                        // inner values of a ring slot
constexpr int PITCH = KW * 2 + 64;              // bytes of a slot's row: lanes of a load fall into different banks
constexpr int SLOT = 8 * PITCH;
constexpr int G = NH / KVH, HALF = H / 2;
constexpr int TOKENS = 8;
constexpr int LONGEST = D >= NH * H && D >= F ? D : NH * H >= F ? NH * H : F;  // row in shared memory
constexpr int Q_PITCH = H * 2 + 64;
constexpr int WHOLE = 512;  // keys that one block takes at once without a merge of blocks
constexpr int SUM_PITCH = 10, SUM_TILE = 16 * SUM_PITCH;  // of 8 tokens: pairs of rows fall into different banks
constexpr int SUMS = WARPS * SUM_TILE;
constexpr int LPR = H / 8, KPL = 32 / LPR, CHUNK = 16, VALUE_LOADS = CHUNK / KPL;

struct Layer {  // addresses, as the table of persistent.py has them
    const float *attn_norm, *q_norm, *k_norm, *ffn_norm;
    const bf16 *qkv, *o, *gate_up, *down;
    bf16 *keys, *values;
};

struct Args {
    const Layer *layers;
    const float *final_norm;
    const bf16 *head;            // [V, D]
    bf16 *x;                     // [T, D]
    u64 *qkv, *mixed, *gated, *middle, *end;  // pairs with tags; the last two: x behind o and down
    float *logits;               // [T, V]
    const int *page_table, *slots, *lengths;
    const float *cosines, *sines;  // [T, H / 2]
    float *partials;             // [items, NH, H + 2]
    u32 *counters;  // [2 + T * KVH]: blocks that are done, the last tag; then merges. 0 at rest but for the tag
    int rows, table_stride;
    float eps, offset, head_eps, head_offset, factor;
};

struct Share {  // of the rows' keys
    int keys, items;
    int ends[TOKENS], lengths[TOKENS], pages[TOKENS];  // items up to a row's last; keys; the page of its own key
    const int *tables[TOKENS];
};

__device__ __forceinline__ float wide(bf16 v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ float rounded(float v) { return low(pack(v, 0.f)); }
__device__ __forceinline__ u32 storable(u32 v) {  // a pair without what is not finite
    return ((v & 0x7f80u) == 0x7f80u ? 0 : v & 0xffffu) | ((v & 0x7f800000u) == 0x7f800000u ? 0 : v & 0xffff0000u);
}
__device__ __forceinline__ float exp_2(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
__device__ __forceinline__ u32 fresh(const void *at) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ float2 fresh_floats(const void *at) {
    const uint2 v = fresh2(at);
    return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}

// Two values of a buffer and their tag, which `take` waits for.
// A word is written again only a layer later, which depends on every reader's results of this one.
__device__ __forceinline__ void put(u64 *buffer, u64 pair, u32 values, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(buffer + pair), "l"((u64)tag << 32 | values) : "memory");
}
__device__ __forceinline__ u32 take(const u64 *buffer, u64 pair, u32 tag) {
    u64 word = 0;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(buffer + pair) : "memory");
    while ((u32)(word >> 32) != tag);
    return (u32)word;
}
struct Four {  // values with their tags
    u64 first, second;
};
__device__ __forceinline__ void glance(Four &four, const u64 *buffer, u64 pair) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(four.first), "=l"(four.second)
                 : "l"(buffer + pair) : "memory");
}
__device__ __forceinline__ uint2 await_four(Four &four, const u64 *buffer, u64 pair, u32 tag) {
    while ((u32)(four.first >> 32) != tag || (u32)(four.second >> 32) != tag) glance(four, buffer, pair);
    return make_uint2((u32)four.first, (u32)four.second);
}
__device__ __forceinline__ float sum_lanes(float v) {
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}
__device__ __forceinline__ void together() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void multiply(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The five products: which rows of the weight a tile has. PAIRED: eight gate rows and their eight up rows.
enum Kind { QKV, OUT, GATE, DOWN, HEAD };
template <Kind KIND> struct Shape {
    static constexpr int INNER = KIND == OUT ? NH * H : KIND == DOWN ? F : D;
    static constexpr int ROWS = KIND == QKV ? (NH + 2 * KVH) * H : KIND == GATE ? F : KIND == HEAD ? V : D;
    static constexpr bool TWO = KIND == QKV || KIND == GATE || KIND == HEAD;  // slots a tile and KW
    static constexpr int STEP = KIND == QKV || KIND == HEAD ? 16 : 8;
    static constexpr int COUNT = (ROWS + STEP - 1) / STEP;
};

struct Ring {
    u32 slots, full, empty;  // shared addresses
    u32 at = 0, turn = 0;    // next slot, parity
    __device__ __forceinline__ void next() {
        if (++at == SLOTS) at = 0, turn ^= 1;
    }
};

__device__ __forceinline__ void fetch(Ring &ring, const bf16 *weight, int inner, int first, int rows) {
    const u32 full = ring.full + ring.at * 8, slot = ring.slots + ring.at * SLOT;
    wait_for(ring.empty + ring.at * 8, ring.turn ^ 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(8 * KW * 2) : "memory");
    for (int row = 0; row < 8; ++row) {
        const bf16 *from = weight + (u64)min(first + row, rows - 1) * inner;
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                slot + row * PITCH), "l"(from), "r"(KW * 2), "r"(full) : "memory");
    }
    ring.next();
}

template <Kind KIND> __device__ void fetch_all(Ring &ring, const bf16 *weight) {
    typedef Shape<KIND> S;
    for (int tile = blockIdx.x; tile < S::COUNT; tile += gridDim.x)
        for (int k = 0; k < S::INNER; k += KW) {
            fetch(ring, weight + k, S::INNER, tile * S::STEP, S::ROWS);
            if (KIND == GATE) fetch(ring, weight + (u64)F * D + k, D, tile * 8, F);
            else if (S::TWO) fetch(ring, weight + k, S::INNER, tile * S::STEP + 8, S::ROWS);
        }
}

// Rows of a buffer to shared memory as they arrive.
template <int INNER> __device__ void gather(const Args &args, const u64 *buffer, u32 tag, char *act) {
    constexpr int PARTS = INNER / (4 * THREADS), TOGETHER = 4;
    const int count = args.rows * PARTS;
    for (int first = 0; first < count; first += TOGETHER) {
        Four four[TOGETHER];
        for (int i = 0; i < TOGETHER; ++i)
            if (first + i < count) glance(four[i], buffer, ((u64)(first + i) * THREADS + threadIdx.x) * 2);
        for (int i = 0; i < TOGETHER; ++i)
            if (first + i < count) {
                const int token = (first + i) / PARTS, part = (first + i) % PARTS;
                *(uint2 *)(act + token * (INNER * 2 + 64) + (part * THREADS + threadIdx.x) * 8) =
                    await_four(four[i], buffer, ((u64)(first + i) * THREADS + threadIdx.x) * 2, tag);
            }
    }
    together();
}

// The same of x, normed; `buffer` null: x as the launch found it. squares: [8, WARPS].
__device__ void gather_normed(const Args &args, const float *weight, float eps, float offset, const u64 *buffer,
                              u32 tag, char *act, float *squares) {
    constexpr int PARTS = D / (4 * THREADS), TOGETHER = 4;
    float4 gain[PARTS];
    for (int part = 0; part < PARTS; ++part) {
        gain[part] = __ldg((const float4 *)weight + part * THREADS + threadIdx.x);
        gain[part].x += offset, gain[part].y += offset, gain[part].z += offset, gain[part].w += offset;
    }
#pragma unroll 1
    for (int first = 0; first < args.rows; first += TOGETHER) {
        Four four[TOGETHER][PARTS];
        for (int i = 0; i < TOGETHER; ++i)
            for (int part = 0; part < PARTS; ++part) {
                const u64 at = ((u64)(first + i) * PARTS + part) * THREADS + threadIdx.x;
                if (buffer && first + i < args.rows) glance(four[i][part], buffer, at * 2);
            }
        for (int i = 0; i < TOGETHER; ++i)
            if (first + i < args.rows) {
                float square = 0.f;
                for (int part = 0; part < PARTS; ++part) {
                    const u64 at = ((u64)(first + i) * PARTS + part) * THREADS + threadIdx.x;
                    const uint2 v =
                        buffer ? await_four(four[i][part], buffer, at * 2, tag) : fresh2((const uint2 *)args.x + at);
                    square += low(v.x) * low(v.x) + high(v.x) * high(v.x) + low(v.y) * low(v.y) + high(v.y) * high(v.y);
                    *(uint2 *)(act + (first + i) * (D * 2 + 64) + (part * THREADS + threadIdx.x) * 8) = v;
                }
                square = sum_lanes(square);
                if (threadIdx.x % 32 == 0) squares[(first + i) * WARPS + threadIdx.x / 32] = square;
            }
    }
    together();
#pragma unroll 2
    for (int token = 0; token < args.rows; ++token) {
        const float4 a = *(const float4 *)(squares + token * WARPS), b = *(const float4 *)(squares + token * WARPS + 4);
        const float scale = rsqrtf((a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w) / D + eps);
        for (int part = 0; part < PARTS; ++part) {
            uint2 *cell = (uint2 *)(act + token * (D * 2 + 64) + (part * THREADS + threadIdx.x) * 8);  // this thread's
            const float4 g = gain[part];
            *cell = make_uint2(pack(low(cell->x) * scale * g.x, high(cell->x) * scale * g.y),
                               pack(low(cell->y) * scale * g.z, high(cell->y) * scale * g.w));
        }
    }
    together();
}

__device__ __forceinline__ float total_of(const float *sums, int row, int token) {
    float total = 0.f;
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp * SUM_TILE + row * SUM_PITCH + token];
    return total;
}

// What a tile's sums become, two rows of the weight a thread. sums: [warps, 16, SUM_PITCH].
template <Kind KIND> __device__ void finish(const Args &args, const float *sums, int tile, u32 residual, u32 tag) {
    constexpr int PAIRS = KIND == QKV || KIND == HEAD ? 8 : 4;
    for (int cell = threadIdx.x; cell < PAIRS * args.rows; cell += THREADS) {
        const int row = cell % PAIRS * 2, token = cell / PAIRS, at = tile * PAIRS * 2 + row;
        const float a = total_of(sums, row, token), b = total_of(sums, row + 1, token);
        if (KIND == QKV) put(args.qkv, ((u64)token * Shape<QKV>::ROWS + at) / 2, pack(a, b), tag);
        if (KIND == HEAD && at < V) __stcs((float2 *)(args.logits + (u64)token * V + at), make_float2(a, b));
        if (KIND == OUT || KIND == DOWN) {
            const u32 sum = pack(a + low(residual), b + high(residual));
            ((u32 *)args.x)[((u64)token * D + at) / 2] = sum;
            put(KIND == OUT ? args.middle : args.end, ((u64)token * D + at) / 2, sum, tag);
        }
        if (KIND == GATE) {
            const float c = total_of(sums, row + 8, token), d = total_of(sums, row + 9, token);
            const u32 gated = pack(a / (1.f + __expf(-a)) * c, b / (1.f + __expf(-b)) * d);
            put(args.gated, ((u64)token * F + at) / 2, gated, tag);
        }
    }
}

// act: the tokens in shared memory.
template <Kind KIND>
__device__ void product(const Args &args, Ring &ring, const char *act, float *sums, u32 tag) {
    typedef Shape<KIND> S;
    constexpr int BLOCKS = KW / WARPS / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const int inner = warp * (KW / WARPS) + quad * 8;  // of this lane in a slot, in steps of 32
    int parity = 0;
    for (int tile = blockIdx.x; tile < S::COUNT; tile += gridDim.x, parity ^= 1) {
        float c[4] = {};
        u32 residual = 0;
        if ((KIND == OUT || KIND == DOWN) && threadIdx.x < 4 * args.rows)  // of this thread's only cell in `finish`
            residual = fresh((const u32 *)args.x + ((u64)(threadIdx.x / 4) * D + tile * 8) / 2 + threadIdx.x % 4);
#pragma unroll 1
        for (int k = 0; k < S::INNER; k += KW) {
            const u32 first = ring.at, second = S::TWO ? (first + 1 == SLOTS ? 0 : first + 1) : first;
            wait_for(ring.full + first * 8, ring.turn);
            ring.next();
            if (S::TWO) wait_for(ring.full + second * 8, ring.turn), ring.next();
            const u32 place = ring.slots + group * PITCH + inner * 2;
            for (int j = 0; j < BLOCKS; ++j) {
                uint4 a, b = make_uint4(0, 0, 0, 0);
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
                             : "r"(place + first * SLOT + j * 64));
                if (S::TWO)
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
                                 : "r"(place + second * SLOT + j * 64));
                const uint4 y = *(const uint4 *)(act + group * (S::INNER * 2 + 64) + (k + inner + j * 32) * 2);
                multiply(c, a.x, b.x, a.y, b.y, y.x, y.y);
                multiply(c, a.z, b.z, a.w, b.w, y.z, y.w);
            }
            __syncwarp();
            if (lane == 0) {
                asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + first * 8) : "memory");
                if (S::TWO)
                    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ring.empty + second * 8) : "memory");
            }
        }
        float *mine = sums + parity * SUMS + warp * SUM_TILE + group * SUM_PITCH + quad * 2;
        *(float2 *)mine = make_float2(c[0], c[1]);
        if (S::TWO) *(float2 *)(mine + 8 * SUM_PITCH) = make_float2(c[2], c[3]);
        together();
        finish<KIND>(args, sums + parity * SUMS, tile, residual, tag);
    }
}

// A head of this step, normed and turned as the cache and the products want it. One warp; `from`: its first pair in
// qkv; out: [H / 2] pairs in shared memory.
__device__ void turn_head(const Args &args, u64 from, const float *weight, int token, u32 tag, u32 *out) {
    constexpr int PAIRS = HALF / 2;  // of a half: one a lane
    const int lane = threadIdx.x % 32;
    float2 a = {0.f, 0.f}, b = a, gain_a = a, gain_b = a, cosine = a, sine = a;
    if (lane < PAIRS) {
        const float2 *gains = (const float2 *)weight;
        if (QK_NORM) gain_a = __ldg(gains + lane), gain_b = __ldg(gains + PAIRS + lane);
        cosine = __ldg((const float2 *)(args.cosines + token * HALF) + lane);
        sine = __ldg((const float2 *)(args.sines + token * HALF) + lane);
        const u32 first = take(args.qkv, from + lane, tag), second = take(args.qkv, from + PAIRS + lane, tag);
        a = make_float2(low(first), high(first)), b = make_float2(low(second), high(second));
    }
    if (QK_NORM) {
        const float scale = rsqrtf(sum_lanes(a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y) / H + args.eps);
        a.x = rounded(a.x * scale * (gain_a.x + args.offset)), a.y = rounded(a.y * scale * (gain_a.y + args.offset));
        b.x = rounded(b.x * scale * (gain_b.x + args.offset)), b.y = rounded(b.y * scale * (gain_b.y + args.offset));
    }
    if (lane < PAIRS) {
        out[lane] = pack(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y);
        out[PAIRS + lane] = pack(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y);
    }
}

// CHUNK keys of a warp and their values: loads of 16 bytes, as the products want them.
struct Held {
    uint4 keys[CHUNK / 8][H / 32], values[VALUE_LOADS];
};

// Where a warp's keys are: of one KV head, up to `end`.
struct Place {
    const bf16 *keys, *values;
    const int *table;
    int head, end;
};

__device__ __forceinline__ u64 offset_of(const Place &place, int key) {
    return key < place.end ? (((u64)place.table[key / PAGE] * KVH + place.head) * PAGE + key % PAGE) * H : 0;
}

__device__ __forceinline__ void load_keys(Held &held, const Place &place, int base) {
    const int lane = threadIdx.x % 32;
    for (int n = 0; n < CHUNK / 8; ++n) {
        const int key = base + n * 8 + lane / 4;
        const bf16 *at = place.keys + offset_of(place, key) + lane % 4 * 8;  // beyond the end: the first, not used
        for (int j = 0; j < H / 32; ++j) held.keys[n][j] = fresh4(at + j * 32);
    }
}

__device__ __forceinline__ void load_values(Held &held, const Place &place, int base) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < VALUE_LOADS; ++i) {
        const int key = base + i * KPL + lane / LPR;
        held.values[i] = fresh4(place.values + offset_of(place, key) + lane % LPR * 8);
    }
}

struct State {  // of a warp's softmax: largest score, weight, sums of 8 dims of each query head
    float top[G], weight[G], sums[G][8];
};

// A warp's keys of `held`, which then holds those from `next` on if there are any. probabilities: [G, CHUNK], its own.
__device__ __forceinline__ void attend_keys(State &state, Held &held, const Place &place, const bf16 *queries,
                                            float *probabilities, float factor, int base, int next) {
    const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    float s[CHUNK / 8][4] = {}, top = -1e30f;
    for (int j = 0; j < H / 32; ++j) {
        const uint4 q = *(const uint4 *)((const char *)queries + group * Q_PITCH + j * 64 + quad * 16);
        for (int n = 0; n < CHUNK / 8; ++n) {
            multiply(s[n], q.x, 0, q.y, 0, held.keys[n][j].x, held.keys[n][j].y);
            multiply(s[n], q.z, 0, q.w, 0, held.keys[n][j].z, held.keys[n][j].w);
        }
    }
    if (next < place.end) load_keys(held, place, next);
    for (int n = 0; n < CHUNK / 8; ++n)
        for (int i = 0; i < 2; ++i) {
            s[n][i] = base + n * 8 + quad * 2 + i < place.end ? s[n][i] * factor : -1e30f;
            top = fmaxf(top, s[n][i]);
        }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    float kept[G];
    for (int g = 0; g < G; ++g) {
        const float higher = fmaxf(state.top[g], __shfl_sync(~0u, top, g * 4));
        kept[g] = exp_2(state.top[g] - higher);
        state.top[g] = higher;
        if (group == g) top = higher;
    }
    float weight = 0.f;
    for (int n = 0; n < CHUNK / 8; ++n)
        for (int i = 0; i < 2; ++i) {
            s[n][i] = s[n][i] > -1e29f ? exp_2(s[n][i] - top) : 0.f;
            weight += s[n][i];
        }
    weight += __shfl_xor_sync(~0u, weight, 1);
    weight += __shfl_xor_sync(~0u, weight, 2);
    __syncwarp();
    if (group < G)
        for (int n = 0; n < CHUNK / 8; ++n)
            *(float2 *)(probabilities + group * CHUNK + n * 8 + quad * 2) = make_float2(s[n][0], s[n][1]);
    __syncwarp();
    for (int g = 0; g < G; ++g) {
        state.weight[g] = state.weight[g] * kept[g] + __shfl_sync(~0u, weight, g * 4);
        for (int d = 0; d < 8; ++d) state.sums[g][d] *= kept[g];
    }
    for (int i = 0; i < VALUE_LOADS; ++i) {
        const u32 v[4] = {held.values[i].x, held.values[i].y, held.values[i].z, held.values[i].w};
        for (int g = 0; g < G; ++g) {
            const float p = probabilities[g * CHUNK + i * KPL + lane / LPR];
            for (int d = 0; d < 4; ++d) {
                state.sums[g][2 * d] += p * low(v[d]);
                state.sums[g][2 * d + 1] += p * high(v[d]);
            }
        }
    }
    if (next < place.end) load_values(held, place, next);
}

// Sums over `count` parts at `stride` values, [H + 2] each: sums, largest score, weight. -> the head's values at `dim`
// and behind it.
template <bool FRESH>
__device__ float2 merged(const float *parts, int count, int stride, int dim, float &top, float &weight) {
    top = -1e30f, weight = 0.f;
    float2 total = {0.f, 0.f};
#pragma unroll 8
    for (int part = 0; part < count; ++part) {
        const float *at = parts + (u64)part * stride + H;
        top = fmaxf(top, FRESH ? __uint_as_float(fresh(at)) : *at);
    }
#pragma unroll 8
    for (int part = 0; part < count; ++part) {
        const float *at = parts + (u64)part * stride;
        const float2 pair = FRESH ? fresh_floats(at + H) : *(const float2 *)(at + H);
        const float2 values = FRESH ? fresh_floats(at + dim) : *(const float2 *)(at + dim);
        const float share = exp_2(pair.x - top);
        weight += pair.y * share, total.x += values.x * share, total.y += values.y * share;
    }
    return total;
}

// A split of a row's keys for one KV head. `held` has each warp's first keys if `begun`.
__device__ void attend_item(const Args &args, const Layer &layer, const Share &share, char *scratch, Held &held,
                            int item, bool begun, u32 tag, u32 *flag) {
    bf16 *queries = (bf16 *)scratch, *own_key = (bf16 *)(scratch + 8 * Q_PITCH), *own_value = own_key + H;
    float *probabilities = (float *)(own_value + H), *parts = probabilities + WARPS * G * CHUNK;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = item % KVH, work = item / KVH;
    int row = 0;
    while (share.ends[row] <= work) ++row;
    const int before = row ? share.ends[row - 1] : 0, splits = share.ends[row] - before, split = work - before;
    const int end = share.lengths[row] - 1, begin = split * share.keys, stop = min(begin + share.keys, end);
    const bool owner = split == splits - 1;
    const int *table = share.tables[row];
    const u64 qkv = (u64)row * Shape<QKV>::ROWS / 2;
    together();  // scratch is free
    for (int task = warp; task < G + 2; task += WARPS) {
        const u64 own_place = (((u64)share.pages[row] * KVH + head) * PAGE + end % PAGE) * H;
        if (task < G)
            turn_head(args, qkv + (head * G + task) * HALF, layer.q_norm, row, tag,
                      (u32 *)((char *)queries + task * Q_PITCH));
        if (task == G) {
            u32 *pairs = (u32 *)own_key;
            turn_head(args, qkv + (NH + head) * HALF, layer.k_norm, row, tag, pairs);
            __syncwarp();
            for (int at = lane; at < HALF; at += 32) {
                pairs[at] = storable(pairs[at]);
                if (owner) ((u32 *)(layer.keys + own_place))[at] = pairs[at];
            }
        }
        if (task == G + 1)
            for (int at = lane; at < HALF; at += 32) {
                const u32 pair = storable(take(args.qkv, qkv + (NH + KVH + head) * HALF + at, tag));
                ((u32 *)own_value)[at] = pair;
                if (owner) ((u32 *)(layer.values + own_place))[at] = pair;
            }
    }
    together();
    State state;
    for (int g = 0; g < G; ++g) {
        state.top[g] = -1e30f, state.weight[g] = 0.f;
        for (int d = 0; d < 8; ++d) state.sums[g][d] = 0.f;
    }
    if (owner && warp == 0)
        for (int g = 0; g < G; ++g) {
            float score = 0.f;
            for (int at = lane; at < H; at += 32)
                score += wide(*(const bf16 *)((const char *)queries + g * Q_PITCH + at * 2)) * wide(own_key[at]);
            state.top[g] = sum_lanes(score) * args.factor, state.weight[g] = 1.f;
            for (int d = 0; d < 8; ++d) state.sums[g][d] = lane < LPR ? wide(own_value[lane * 8 + d]) : 0.f;
        }
    const Place place = {layer.keys, layer.values, table, head, stop};
    int base = begin + warp * CHUNK;
    if (!begun && base < stop) load_keys(held, place, base), load_values(held, place, base);
#pragma unroll 1
    for (; base < stop; base += WARPS * CHUNK)
        attend_keys(state, held, place, queries, probabilities + warp * G * CHUNK, args.factor, base,
                    base + WARPS * CHUNK);
    for (int g = 0; g < G; ++g) {
        float *mine = parts + (warp * G + g) * (H + 2);
        for (int d = 0; d < 8; ++d) {
            float sum = state.sums[g][d];
            for (int step = 16; step >= LPR; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane < LPR) mine[lane * 8 + d] = sum;
        }
        if (lane == 0) mine[H] = state.top[g], mine[H + 1] = state.weight[g];
    }
    together();
    float *mine = args.partials + ((u64)work * NH + head * G) * (H + 2);
    for (int cell = threadIdx.x; cell < G * HALF; cell += THREADS) {
        const int g = cell / HALF, dim = cell % HALF * 2;
        float top, weight;
        const float2 total = merged<false>(parts + g * (H + 2), WARPS, G * (H + 2), dim, top, weight);
        if (splits == 1) {
            const u32 pair = pack(total.x / weight, total.y / weight);
            put(args.mixed, ((u64)row * NH + head * G + g) * HALF + dim / 2, pair, tag);
        } else {
            *(float2 *)(mine + g * (H + 2) + dim) = total;
            if (dim == 0) *(float2 *)(mine + g * (H + 2) + H) = make_float2(top, weight);
        }
    }
    if (splits == 1) return;
    together();
    u32 *counter = args.counters + 2 + row * KVH + head;
    if (threadIdx.x == 0) {
        __threadfence();
        *flag = atomicAdd(counter, 1);
        __threadfence();
        if (*flag == splits - 1) *counter = 0;
    }
    together();
    if (*flag != splits - 1) return;
    for (int cell = threadIdx.x; cell < G * HALF; cell += THREADS) {
        const int g = cell / HALF, dim = cell % HALF * 2;
        const float *parts = mine - (u64)split * NH * (H + 2) + g * (H + 2);
        float top, weight;
        const float2 total = merged<true>(parts, splits, NH * (H + 2), dim, top, weight);
        put(args.mixed, ((u64)row * NH + head * G + g) * HALF + dim / 2, pack(total.x / weight, total.y / weight), tag);
    }
}

__device__ void attention(const Args &args, const Layer &layer, const Share &share, char *scratch, u32 tag,
                          u32 *flag) {
    Held held;
    int item = blockIdx.x;
    if (item < share.items * KVH) {  // old keys are nobody's to write: the first are loaded before this step's
        const int head = item % KVH, work = item / KVH;
        int row = 0;
        while (share.ends[row] <= work) ++row;
        const int split = work - (row ? share.ends[row - 1] : 0), begin = split * share.keys;
        const Place place = {layer.keys, layer.values, share.tables[row], head,
                             min(begin + share.keys, share.lengths[row] - 1)};
        const int base = begin + threadIdx.x / 32 * CHUNK;
        if (base < place.end) load_keys(held, place, base), load_values(held, place, base);
    }
    bool begun = true;
#pragma unroll 1
    for (; item < share.items * KVH; item += gridDim.x, begun = false)
        attend_item(args, layer, share, scratch, held, item, begun, tag, flag);
}

// One warp. Rows longer than one block takes at once are cut so that all blocks have about as many keys.
__device__ void make_share(const Args &args, Share &share) {
    const int row = threadIdx.x;
    const int length = row < args.rows ? args.lengths[row] : 0;
    int total = length, longest = length;
    for (int step = 16; step; step /= 2) {
        total += __shfl_xor_sync(~0u, total, step);
        longest = max(longest, __shfl_xor_sync(~0u, longest, step));
    }
    const int even = (int)((long long)total * KVH / gridDim.x);
    const int keys = longest <= WHOLE ? WHOLE : max(128, (even + 63) / 64 * 64);
    int end = row < args.rows ? max(1, (length - 2 + keys) / keys) : 0;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, end, step);
        if (row >= step) end += other;
    }
    if (row < args.rows) {
        const int *table = args.page_table + (u64)args.slots[row] * args.table_stride;
        share.lengths[row] = length, share.ends[row] = end;
        share.tables[row] = table, share.pages[row] = table[(length - 1) / PAGE];
    }
    if (row == 31) share.keys = keys, share.items = end;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) persistent_decode(const Args args) {
    extern __shared__ __align__(128) char memory[];
    __shared__ __align__(8) u64 barriers[2 * SLOTS];
    __shared__ Share share;
    __shared__ Layer layers[LAYERS];
    __shared__ u32 flag;
    __shared__ __align__(16) float squares[8 * WARPS];
    char *act = memory + SLOTS * SLOT, *scratch = act + TOKENS * (LONGEST * 2 + 64);
    float *sums = (float *)scratch;
    Ring ring;
    ring.slots = shared_address(memory), ring.full = shared_address(barriers), ring.empty = ring.full + SLOTS * 8;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < SLOTS; ++slot) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.full + slot * 8) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ring.empty + slot * 8), "r"(WARPS) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x < 32) make_share(args, share);
    for (int at = threadIdx.x; at < LAYERS * (int)(sizeof(Layer) / 8); at += THREADS + 32)
        ((u64 *)layers)[at] = ((const u64 *)args.layers)[at];
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS) {
            for (int at = 0; at < LAYERS; ++at) {
                const Layer &layer = layers[at];
                fetch_all<QKV>(ring, layer.qkv);
                fetch_all<OUT>(ring, layer.o);
                fetch_all<GATE>(ring, layer.gate_up);
                fetch_all<DOWN>(ring, layer.down);
            }
            fetch_all<HEAD>(ring, args.head);
        }
        return;
    }
    const u32 tags = fresh(args.counters + 1);
    for (int at = 0; at < LAYERS; ++at) {
        const Layer &layer = layers[at];
        const u32 tag = tags + at + 1;
        // Who has no part of a product must not wait for its inputs: they might be overwritten.
        if (blockIdx.x < Shape<QKV>::COUNT)
            gather_normed(args, layer.attn_norm, args.eps, args.offset, at ? args.end : nullptr, tag - 1, act, squares);
        product<QKV>(args, ring, act, sums, tag);
        attention(args, layer, share, scratch, tag, &flag);
        if (blockIdx.x < Shape<OUT>::COUNT) gather<NH * H>(args, args.mixed, tag, act);
        product<OUT>(args, ring, act, sums, tag);
        if (blockIdx.x < Shape<GATE>::COUNT)
            gather_normed(args, layer.ffn_norm, args.eps, args.offset, args.middle, tag, act, squares);
        product<GATE>(args, ring, act, sums, tag);
        if (blockIdx.x < Shape<DOWN>::COUNT) gather<F>(args, args.gated, tag, act);
        product<DOWN>(args, ring, act, sums, tag);
    }
    gather_normed(args, args.final_norm, args.head_eps, args.head_offset, args.end, tags + LAYERS, act, squares);
    product<HEAD>(args, ring, act, sums, 0);
    if (threadIdx.x == 0) {  // the last block leaves the counters as the next launch wants them
        __threadfence();
        if (atomicAdd(args.counters, 1) == gridDim.x - 1) args.counters[0] = 0, args.counters[1] = tags + LAYERS;
    }
}
