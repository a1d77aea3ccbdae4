// A product of few rows with a weight that fits the shared memory of all multiprocessors; compiled by NVRTC.
//
// A block keeps a slab of the weight, OUTS rows of KS inputs, and asks for all of it before it waits for the kernel in
// front: when that ends, what is left are the rows. CLUSTER blocks share the inner axis. Each multiplies its part and
// sends its sums to the block that finishes them (st.async into its shared memory, which counts their bytes), so no sum
// goes through global memory and no block waits for a fence. Sums are added in the order of the inner axis.
// Products: m16n8k16, a warp has 16 outputs of all rows. The norm's gain is multiplied in front, 1 / rms behind.
// Constants from outside: ROWS (16 or 32); KS; OUTS; CLUSTER; KIND of activation (0: not gated; else half of OUTS are
// rows of the gate, half of up); NORM. Letters: T tokens, I inputs, O outputs.

#include "device.cuh"

constexpr int WARPS = OUTS / 16, THREADS = WARPS * 32;
constexpr int PITCH = KS * 2 + 16;  // bytes of a staged row: eight rows of a load fall into different banks
constexpr int CHUNKS = KS / 8;      // of 16 bytes in a row
constexpr int PARTS = KIND ? 2 : 1;
constexpr int UNITS = WARPS / PARTS, KEPT = UNITS * 16;
// An item is what 32 lanes finish: four outputs each of 8 rows.
constexpr int ITEMS = UNITS * ROWS / 8, SHARE = (ITEMS + CLUSTER - 1) / CLUSTER;
constexpr int ITEM_BYTES = CLUSTER * PARTS * 512;  // the sums of an item, of all blocks
constexpr int GOT_BYTES = SHARE * ITEM_BYTES, SQUARE_BYTES = NORM ? CLUSTER * ROWS * 4 : 0;
static_assert(KS % 16 == 0 && (!NORM || CHUNKS == 32), "see slab_linear.py");

struct Args {
    const bf16 *x;             // [T, I]
    const float *norm_weight;  // [I]
    const bf16 *weight;        // [O, I]
    const bf16 *bias;          // [O] or null
    const bf16 *residual;      // [T, outs] or null
    bf16 *out;                 // [T, outs]
    int rows, outs, inner;
    float eps, offset;
};

__device__ __forceinline__ void copy16(u32 to, const void *from, u32 bytes) {  // zeros behind `bytes`
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 of_block(u32 at, u32 rank) {
    u32 out;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(at), "r"(rank));
    return out;
}
__device__ __forceinline__ void send4(u32 to, u32 counter, float a, float b, float c, float d) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to),
                 "f"(a), "f"(b), "f"(c), "f"(d), "r"(counter) : "memory");
}
__device__ __forceinline__ void send1(u32 to, u32 counter, float a) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(a),
                 "r"(counter) : "memory");
}
__device__ __forceinline__ void wait_for(u32 counter) {  // until all bytes that it expects have come
    u32 done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(counter) : "memory");
}
__device__ __forceinline__ float act(float x) {
    if (KIND == 1) return x / (1.f + __expf(-x));
    if (KIND == 2) return x / (1.f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
}

extern "C" __global__ void __launch_bounds__(THREADS) slab_linear(const Args given) {
    extern __shared__ __align__(128) unsigned char memory[];
    unsigned char *got = memory, *squares = got + GOT_BYTES, *counter = squares + SQUARE_BYTES;
    unsigned char *weights = counter + 16, *inputs = weights + OUTS * PITCH;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int slab = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, first = rank * KS;
    const int items = (ITEMS - rank + CLUSTER - 1) / CLUSTER;  // of this block
    const u32 weights_at = shared_address(weights), inputs_at = shared_address(inputs);
    const u32 got_at = shared_address(got), squares_at = shared_address(squares), counter_at = shared_address(counter);

    if (thread == 0) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(counter_at) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(counter_at),
                     "r"(items * ITEM_BYTES + SQUARE_BYTES) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#pragma unroll 4
    for (int i = thread; i < OUTS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const int out = row < KEPT ? slab * KEPT + row : given.outs + slab * KEPT + row - KEPT;
        // within 16 rows: so that a lane's sums are of four outputs that follow each other
        const int place = row & ~15 | (row & 2) << 2 | (row & 12) >> 1 | row & 1;
        copy16(weights_at + place * PITCH + chunk * 16, given.weight + (u64)out * given.inner + first + chunk * 8, 16);
    }
    float gain[8];
    if (NORM) {  // a lane has the same inputs of every row
#pragma unroll
        for (int i = 0; i < 8; i++) gain[i] = given.norm_weight[first + lane * 8 + i] + given.offset;
    }
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // all counters of the cluster are there
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

    constexpr int LOADS = (ROWS * CHUNKS + THREADS - 1) / THREADS;
    if (NORM) {
        uint4 held[LOADS];
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            const int row = (thread + n * THREADS) / CHUNKS;
            held[n] = make_uint4(0, 0, 0, 0);
            if (row < given.rows) held[n] = fresh4(given.x + (u64)row * given.inner + first + lane * 8);
        }
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            const int row = (thread + n * THREADS) / CHUNKS;
            if (row >= ROWS) break;
            u32 *words = (u32 *)&held[n];
            float square = 0.f;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const float a = low(words[w]), b = high(words[w]);
                square += a * a + b * b;
                words[w] = pack(a * gain[2 * w], b * gain[2 * w + 1]);
            }
            *(uint4 *)(inputs + row * PITCH + lane * 16) = held[n];
#pragma unroll
            for (int step = 16; step; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
            if (lane < CLUSTER)
                send1(of_block(squares_at + (rank * ROWS + row) * 4, lane), of_block(counter_at, lane), square);
        }
    } else {
#pragma unroll
        for (int n = 0; n < LOADS; n++) {
            const int i = thread + n * THREADS, row = i / CHUNKS, chunk = i % CHUNKS;
            if (row >= ROWS) break;
            const int from = row < given.rows ? row : 0;
            copy16(inputs_at + row * PITCH + chunk * 16, given.x + (u64)from * given.inner + first + chunk * 8,
                   row < given.rows ? 16 : 0);
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    float sums[ROWS / 16][2][4] = {};
    const u32 a_at = inputs_at + lane % 16 * PITCH + lane / 16 * 16;
    const u32 b_at = weights_at + (warp * 16 + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
#pragma unroll 4
    for (int k = 0; k < KS / 16; k++) {
        u32 a[4], b[4];
        load_matrices(b, b_at + k * 32);
#pragma unroll
        for (int m = 0; m < ROWS / 16; m++) {
            load_matrices(a, a_at + m * 16 * PITCH + k * 32);
            multiply(sums[m][0], a, b[0], b[1]);
            multiply(sums[m][1], a, b[2], b[3]);
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS / 16; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int item = warp % UNITS * (ROWS / 8) + m * 2 + half, owner = item % CLUSTER;
            const int place = ((rank * SHARE + item / CLUSTER) * PARTS + warp / UNITS) * 32 + lane;
            send4(of_block(got_at + place * 16, owner), of_block(counter_at, owner), sums[m][0][2 * half],
                  sums[m][0][2 * half + 1], sums[m][1][2 * half], sums[m][1][2 * half + 1]);
        }
    }

    bool waited = false;
    for (int mine = warp; mine < items; mine += WARPS) {
        const int item = mine * CLUSTER + rank, row = item % (ROWS / 8) * 8 + lane / 4;
        const int column = slab * KEPT + item / (ROWS / 8) * 16 + lane % 4 * 4;
        const u64 place = (u64)row * given.outs + column;
        uint2 before = make_uint2(0, 0);
        if (given.residual && row < given.rows) before = fresh2(given.residual + place);
        if (!waited) wait_for(counter_at);
        waited = true;
        float v[4] = {}, u[4] = {}, square = 0.f;
#pragma unroll
        for (int c = 0; c < CLUSTER; c++) {
            const float4 part = *(const float4 *)(got + (((c * SHARE + mine) * PARTS) * 32 + lane) * 16);
            v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
            if (KIND) {
                const float4 up = *(const float4 *)(got + (((c * SHARE + mine) * PARTS + 1) * 32 + lane) * 16);
                u[0] += up.x, u[1] += up.y, u[2] += up.z, u[3] += up.w;
            }
            if (NORM) square += *(const float *)(squares + (c * ROWS + row) * 4);
        }
        if (row >= given.rows) continue;
        const float scale = NORM ? rsqrtf(square / given.inner + given.eps) : 1.f;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            v[n] *= scale;
            if (given.bias) v[n] += low(given.bias[column + n]);
            if (KIND) {
                u[n] *= scale;
                if (given.bias) u[n] += low(given.bias[given.outs + column + n]);
                v[n] = act(v[n]) * u[n];
            }
        }
        v[0] += low(before.x), v[1] += high(before.x), v[2] += low(before.y), v[3] += high(before.y);
        *(uint2 *)(given.out + place) = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
    }
    if (warp == 0 && !waited) wait_for(counter_at);  // a block without items must not leave while others send to it
}
