// One token through a whole decoder on a CPU: everything between the linears that kernel.cpp multiplies. A C ABI.
//
// Decides: in which order a decoder block of the standard kind computes, and that nothing of it leaves C++ between two
// tokens. standard.py finds out whether a model's blocks are of that kind, and decode.py has the twins of these structs.
// Everything is computed in float32, whatever the dtype of weights, keys and values.
//
// A block: norm, q, k, v, norms of q and k (or none), rotation, attention, o, sum; norm, gate, up, silu(gate) * up, down, sum.
// A token is one job of threads.cpp, with five steps a block and one for the head; so helpers are woken once a token. Steps are
// shared out by output channels and by heads, each of which one thread computes alone: results do not depend on the number of
// threads, to the bit. Norms, and the rounding of a step's inputs, are small: each thread that takes part does them for itself.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#define ISA_PORTABLE 0
#ifndef NEARPLANE_ISA
#define NEARPLANE_ISA ISA_PORTABLE
#endif
#if NEARPLANE_ISA == ISA_PORTABLE || defined(NEARPLANE_EMULATED)  // compilers use what vectors there are
#define HALVES 0
#else
#define HALVES NEARPLANE_ISA
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions that are inlined
#endif

struct NearplaneWeight;

extern "C" {
// Of kernel.cpp, but for the last.
int nearplane_prepare(const NearplaneWeight* w, const float* x, int path);
void nearplane_tiles(const NearplaneWeight* w, int path, const void* bias, int bias_dtype, float* y, int64_t first, int64_t last);
int nearplane_alike(const NearplaneWeight* a, int path_a, const NearplaneWeight* b, int path_b);
int64_t nearplane_tile_bytes(const NearplaneWeight* w);
int nearplane_steps(int (*work)(void*, int64_t, int64_t), void* context, const int64_t* chunks, int64_t steps, int64_t products,
                    int threads);

struct NearplaneMatrix {            // [out, in], packed or dense
    const NearplaneWeight* packed;  // or null
    const void* dense;              // or null
    const void* bias;               // or null
    int64_t out, in;
    int32_t dtype, bias_dtype, path;
};
struct NearplaneNorm {
    const void* weight;  // or null: no norm
    int32_t dtype;
    float eps;
};
struct NearplaneBlock {
    NearplaneMatrix q, k, v, o, gate, up, down;
    NearplaneNorm before, after, query, key;
    int64_t window;  // positions that a token sees, itself included; 0: all
    int32_t turns;   // whether q and k are rotated
};
struct NearplaneDecoder {
    const NearplaneBlock* blocks;
    NearplaneMatrix embedding, head;
    NearplaneNorm last;
    int64_t count, hidden, heads, shared, width, turned, inner;  // shared: heads of keys; turned: of a head's width
    float scale, embedded, added, divided;  // of scores; of the embedding; of what a block adds; of logits
    int32_t dtype;                          // of keys, values and logits
};
struct NearplaneMemory {  // of one block
    void *keys, *values;  // [shared, capacity, width]
    int64_t stored;       // positions so far
};
}

namespace {

enum Dtype { F32 = 0, F16 = 1, BF16 = 2 };
constexpr int LANES = 16;
constexpr int64_t TILE = 16;  // output channels of a packed weight that lie together
using Real = float __attribute__((vector_size(64)));
using Word = uint32_t __attribute__((vector_size(64)));
using Int = int32_t __attribute__((vector_size(64)));
using Short = uint16_t __attribute__((vector_size(32)));

INLINE Real all(float x) { return Real{} + x; }
template <class V> INLINE V get(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void put(float* p, const Real& v) { memcpy(p, &v, sizeof v); }

INLINE float half(uint16_t h) {
    const uint32_t rest = uint32_t(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &rest, 4);
    f *= 0x1p112f;
    uint32_t u;
    memcpy(&u, &f, 4);
    u = (rest >= 0x0f800000 ? rest | 0x7f800000 : u) | uint32_t(h & 0x8000) << 16;
    memcpy(&f, &u, 4);
    return f;
}
INLINE float element(const void* p, int64_t i, int dtype) {
    if (dtype == F32) return static_cast<const float*>(p)[i];
    const uint16_t u = static_cast<const uint16_t*>(p)[i];
    if (dtype == F16) return half(u);
    const uint32_t wide = uint32_t(u) << 16;
    float f;
    memcpy(&f, &wide, 4);
    return f;
}
INLINE uint16_t rounded(float f, int dtype) {  // to nearest, ties to even
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (dtype == BF16) return rest > 0x7f800000 ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal: units of 2^-24
        float small;
        memcpy(&small, &rest, 4);
        small += 0.5f;
        memcpy(&u, &small, 4);
        return uint16_t(sign | (u & 0x7fff));
    }
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}
void write(const float* x, int64_t n, void* to, int64_t at, int dtype) {
    if (dtype == F32) memcpy(static_cast<float*>(to) + at, x, size_t(n) * 4);
    else
        for (int64_t i = 0; i < n; i++) static_cast<uint16_t*>(to)[at + i] = rounded(x[i], dtype);
}
INLINE const void* from(const void* p, int64_t at, int dtype) {
    return static_cast<const char*>(p) + at * (dtype == F32 ? 4 : 2);
}

template <int DTYPE> INLINE Real wide(const void* p) {  // 16 numbers
    if constexpr (DTYPE == F32) return get<Real>(p);
    if constexpr (DTYPE == BF16) {
        const Word w = __builtin_convertvector(get<Short>(p), Word) << 16;
        return get<Real>(&w);
    }
#if HALVES == 2
    const __m512 h = _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return get<Real>(&h);
#elif HALVES == 1
    const __m128i* q = static_cast<const __m128i*>(p);
    const __m256 h[2] = {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
    return get<Real>(h);
#else
    Real r;
    for (int i = 0; i < LANES; i++) r[i] = half(static_cast<const uint16_t*>(p)[i]);
    return r;
#endif
}

INLINE float total(const Real& v) {
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = v[i] + v[i + 8];
    for (int n = 4; n > 0; n /= 2)
        for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}
// The same of several vectors, in the same order of sums.
template <int COUNT> INLINE void totals(const Real (&v)[COUNT], float* y) {
#if HALVES
    if constexpr (COUNT == 4) {
        __m128 quarters[4];
        for (int i = 0; i < 4; i++) {
#if HALVES == 2
            const __m512 whole = get<__m512>(&v[i]);
            const __m256 low = _mm512_castps512_ps256(whole);
            const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
#else
            const __m256 low = get<__m256>(&v[i]), high = get<__m256>(reinterpret_cast<const float*>(&v[i]) + 8);
#endif
            const __m256 half = _mm256_add_ps(low, high);
            quarters[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        }
        const __m128 a = _mm_add_ps(_mm_unpacklo_ps(quarters[0], quarters[1]), _mm_unpackhi_ps(quarters[0], quarters[1]));
        const __m128 b = _mm_add_ps(_mm_unpacklo_ps(quarters[2], quarters[3]), _mm_unpackhi_ps(quarters[2], quarters[3]));
        _mm_storeu_ps(y, _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
        return;
    }
#endif
    for (int i = 0; i < COUNT; i++) y[i] = total(v[i]);
}

INLINE Real exponential(const Real& of) {  // within 2e-7 of the value; 0 far below
    const Real low = all(-87.f), high = all(88.f);
    const Int under = of < low, over = of > high;
    const Real x = under ? low : over ? high : of;
    const Real magic = all(12582912.f);  // rounds to an integer, which its last bits are
    const Real shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const Int power = (get<Int>(&shifted) - get<Int>(&magic) + 127) << 23;
    const Real y = p * get<Real>(&power);
    return under ? all(0.f) : y;
}

constexpr int AHEAD = 16384;  // bytes; the hardware stops at the end of a page

// Sums of products of a weight's rows with x.
template <int DTYPE, int ROWS> INLINE void dots(const void* w, int64_t stride, const float* x, int64_t n, float* y) {
    Real sums[ROWS][2] = {};
    const char* p = static_cast<const char*>(w);
    constexpr int SIZE = DTYPE == F32 ? 4 : 2;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) {
                const char* at = p + (r * stride + i + half * LANES) * SIZE;
                if (SIZE == 4 || half == 0) __builtin_prefetch(at + AHEAD);
                sums[r][half] += wide<DTYPE>(at) * get<Real>(x + i + half * LANES);
            }
    for (; i + LANES <= n; i += LANES)
        for (int r = 0; r < ROWS; r++) sums[r][0] += wide<DTYPE>(p + (r * stride + i) * SIZE) * get<Real>(x + i);
    Real both[ROWS];
    for (int r = 0; r < ROWS; r++) both[r] = sums[r][0] + sums[r][1];
    totals(both, y);
    for (int r = 0; r < ROWS; r++) {
        for (int64_t j = i; j < n; j++) y[r] += element(p, r * stride + j, DTYPE) * x[j];
    }
}

// Rows [first, last) of a product with a dense weight.
template <int DTYPE> void dense_rows(const NearplaneMatrix& w, const float* x, float* y, int64_t first, int64_t last) {
    int64_t row = first;
    for (; row + 2 <= last; row += 2) dots<DTYPE, 2>(from(w.dense, row * w.in, DTYPE), w.in, x, w.in, y + row);
    for (; row < last; row++) dots<DTYPE, 1>(from(w.dense, row * w.in, DTYPE), w.in, x, w.in, y + row);
    for (row = first; w.bias != nullptr && row < last; row++) y[row] += element(w.bias, row, w.bias_dtype);
}

constexpr int64_t LEAST_BYTES = 1 << 14, MOST_BYTES = 1 << 17;  // of weights in a chunk: some 0.5 and 5 microseconds
constexpr int64_t CHUNKS = 64;                                  // of a weight, within those bounds

INLINE int64_t parts_of(int64_t n, int64_t each) { return (n + each - 1) / each; }

struct Cut {  // of a weight into chunks, the same for any number of threads
    int64_t rows, chunks;  // rows: of a chunk, a multiple of 16
};
int64_t rows_of(const NearplaneMatrix& w) {
    const int64_t tile = w.packed != nullptr ? nearplane_tile_bytes(w.packed) : w.in * TILE * (w.dtype == F32 ? 4 : 2);
    const int64_t bytes = std::clamp((w.out + TILE - 1) / TILE * tile / CHUNKS, LEAST_BYTES, MOST_BYTES);
    return TILE * std::max<int64_t>(1, bytes / tile);
}

// What a thread keeps for itself while it takes part in a step.
struct Mine {
    uint64_t token = 0;  // a number of its own for each token of the process
    int64_t step = -1;
    const float* x = nullptr;                   // what the step's linears read
    const NearplaneMatrix* prepared = nullptr;  // for which kernel.cpp has that prepared in this thread
    std::vector<float> normed, key;
    std::vector<char> stored;  // the token's key and value of one head, as they are kept

    int multiply(const NearplaneMatrix& w, float* y, int64_t first, int64_t last) {
        if (w.packed != nullptr) {
            if (prepared != &w && (prepared == nullptr || !nearplane_alike(prepared->packed, prepared->path, w.packed, w.path)) &&
                nearplane_prepare(w.packed, x, w.path))
                return 1;
            prepared = &w;
            nearplane_tiles(w.packed, w.path, w.bias, w.bias_dtype, y, first / TILE, parts_of(last, TILE));
        } else if (w.dtype == F32) {
            dense_rows<F32>(w, x, y, first, last);
        } else if (w.dtype == F16) {
            dense_rows<F16>(w, x, y, first, last);
        } else {
            dense_rows<BF16>(w, x, y, first, last);
        }
        return 0;
    }
};

void normalize(const NearplaneNorm& norm, const float* x, int64_t n, float* y) {
    Real sums{};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += get<Real>(x + i) * get<Real>(x + i);
    float sum = total(sums);
    for (; i < n; i++) sum += x[i] * x[i];
    const float factor = 1.f / std::sqrt(sum / float(n) + norm.eps);
    if (norm.dtype == F32) {
        const float* weight = static_cast<const float*>(norm.weight);
        for (i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
    } else {
        for (i = 0; i < n; i++) y[i] = x[i] * factor * element(norm.weight, i, norm.dtype);
    }
}

// Rotates the first `turned` numbers of a head, the i-th with the one half of them further.
void turn(float* x, int64_t turned, const float* cosine, const float* sine) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

void gate(const float* g, float* up, int64_t n) {  // up = silu(g) * up, both padded to a multiple of 16
    for (int64_t i = 0; i < n; i += LANES) {
        const Real x = get<Real>(g + i);
        put(up + i, x / (exponential(-x) + 1.f) * get<Real>(up + i));
    }
}

INLINE Real greater(const Real& a, const Real& b) {  // NaN where either is
    const Int over = (a > b) | (a != a);
    return over ? a : b;
}

// One head of attention over positions in memory, and one more that comes from elsewhere.
template <int DTYPE> struct Head {
    const void *keys, *values, *key, *value;
    int64_t n, width;  // positions, the last of them included
    float scale;

    void attend(const float* q, float* score, float* y) const {  // score [n padded to 16]
        int64_t t = 0;
        for (; t + 4 < n; t += 4) dots<DTYPE, 4>(from(keys, t * width, DTYPE), width, q, width, score + t);
        for (; t + 1 < n; t++) dots<DTYPE, 1>(from(keys, t * width, DTYPE), width, q, width, score + t);
        dots<DTYPE, 1>(key, width, q, width, score + t);
        for (t = n; t % LANES != 0; t++) score[t] = -INFINITY;
        Real greatest = get<Real>(score);
        for (t = LANES; t < n; t += LANES) greatest = greater(get<Real>(score + t), greatest);
        float most = greatest[0];
        for (int i = 1; i < LANES; i++) most = greatest[i] > most || greatest[i] != greatest[i] ? greatest[i] : most;
        Real sums{};
        for (t = 0; t < n; t += LANES) {
            const Real e = exponential((get<Real>(score + t) - most) * scale);
            put(score + t, e);
            sums += e;
        }
        const float by = 1.f / total(sums);
        int64_t i = 0;
        for (; i + 4 * LANES <= width; i += 4 * LANES) columns<4>(score, i, by, y);
        for (; i + LANES <= width; i += LANES) columns<1>(score, i, by, y);
        for (; i < width; i++) {
            float sum = 0.f;
            for (t = 0; t + 1 < n; t++) sum += score[t] * element(values, t * width + i, DTYPE);
            y[i] = (sum + score[n - 1] * element(value, i, DTYPE)) * by;
        }
    }
    template <int PARTS> INLINE void columns(const float* score, int64_t i, float by, float* y) const {
        Real sums[2][PARTS] = {};  // of even and odd positions: a sum alone waits for itself
        int64_t t = 0;
        for (; t + 2 < n; t += 2)
            for (int odd = 0; odd < 2; odd++)
                for (int p = 0; p < PARTS; p++) {
                    const void* at = from(values, (t + odd) * width + i + p * LANES, DTYPE);
                    __builtin_prefetch(static_cast<const char*>(at) + AHEAD / 4);
                    sums[odd][p] += wide<DTYPE>(at) * score[t + odd];
                }
        for (; t < n; t++)
            for (int p = 0; p < PARTS; p++) {
                const void* row = t + 1 < n ? from(values, t * width, DTYPE) : value;
                sums[0][p] += wide<DTYPE>(from(row, i + p * LANES, DTYPE)) * score[t];
            }
        for (int p = 0; p < PARTS; p++) put(y + i + p * LANES, (sums[0][p] + sums[1][p]) * by);
    }
};

INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// What a token needs on its way.
struct Scratch {
    std::vector<float> x, y, q, k, v, mixed, gate, up, scores, logits;
    std::vector<int64_t> chunks;  // of each step
    std::vector<Cut> cuts;        // q, k, v, o, gate with up, down of each block; head

    void fit(const NearplaneDecoder& m, int64_t positions) {
        chunks.resize(size_t(5 * m.count + 1));
        cuts.resize(size_t(6 * m.count + 1));
        const int64_t q_width = m.heads * m.width, k_width = m.shared * m.width;
        for (auto* part : {&x, &y}) part->resize(size_t(whole(m.hidden)));
        for (auto* part : {&q, &mixed}) part->resize(size_t(whole(q_width)));
        for (auto* part : {&k, &v}) part->resize(size_t(whole(k_width)));
        for (auto* part : {&gate, &up}) part->resize(size_t(whole(m.inner)));
        const size_t wanted = size_t(m.heads * whole(positions));
        if (scores.size() < wanted) scores.resize(wanted);
        if (m.dtype != F32) logits.resize(size_t(m.head.out));
    }
};

enum Step { QKV, ATTENTION, OUTPUT, GATE, DOWN, STEPS };  // of a block
constexpr int64_t CUTS = 6;

struct Token {
    const NearplaneDecoder& m;
    const NearplaneMemory* memories;
    int64_t capacity;
    const float *cosine, *sine;
    Scratch& s;
    const float* hidden;  // what the head reads; null: the norm of x
    float* y;             // of the head
    void* logits;         // [vocabulary]
    int64_t blocks;       // steps of them come before the head's
    int32_t dtype;        // of logits
    float divided;
    uint64_t number;

    // Fills in cuts and chunks of every step. Returns the multiplications of all.
    int64_t plan(bool head) {
        int64_t products = head ? m.head.out * m.head.in : 0;
        for (int64_t i = 0; i < blocks; i++) {
            const NearplaneBlock& b = m.blocks[i];
            Cut* cut = s.cuts.data() + CUTS * i;
            for (const NearplaneMatrix* w : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.down}) {
                const int64_t rows = w == &b.gate ? std::min(rows_of(b.gate), rows_of(b.up)) : rows_of(*w);
                *cut++ = {rows, parts_of(w->out, rows)};
                products += w->out * w->in * (w == &b.gate ? 2 : 1);
            }
            products += 2 * m.heads * m.width * seen(i);
            int64_t* chunks = s.chunks.data() + STEPS * i;
            cut -= CUTS;
            chunks[QKV] = cut[0].chunks + cut[1].chunks + cut[2].chunks;
            chunks[ATTENTION] = m.heads;
            for (int step = OUTPUT; step < STEPS; step++) chunks[step] = cut[step + 1].chunks;
        }
        const int64_t rows = rows_of(m.head);
        s.cuts[size_t(CUTS * blocks)] = {rows, parts_of(m.head.out, rows)};
        if (head) s.chunks[size_t(STEPS * blocks)] = parts_of(m.head.out, rows);
        return products;
    }
    int64_t seen(int64_t block) const {  // positions, with the token's own
        const int64_t end = memories[block].stored + 1, window = m.blocks[block].window;
        return window > 0 && end > window ? window : end;
    }

    static int work(void* context, int64_t step, int64_t chunk) {
        static thread_local Mine mine;
        const Token& t = *static_cast<const Token*>(context);
        try {
            return t.take(mine, step, chunk);
        } catch (const std::bad_alloc&) {
            return 1;
        }
    }

  private:
    int take(Mine& mine, int64_t step, int64_t chunk) const {
        const int64_t block = step / STEPS, kind = step % STEPS;
        const bool head = block == blocks;
        if (mine.token != number || mine.step != step) {
            mine.prepared = nullptr;
            if (head) mine.x = hidden != nullptr ? hidden : norm(mine, m.last);
            else if (kind == QKV) mine.x = norm(mine, m.blocks[block].before);
            else if (kind == GATE) mine.x = norm(mine, m.blocks[block].after);
            else mine.x = kind == OUTPUT ? s.mixed.data() : s.up.data();
            mine.token = number, mine.step = step;
        }
        const Cut* cuts = s.cuts.data() + CUTS * block;
        if (head) return last(mine, *cuts, chunk);
        const NearplaneBlock& b = m.blocks[block];
        if (kind == QKV) return one_of_three(mine, b, cuts, chunk);
        if (kind == OUTPUT) return sum(mine, b.o, cuts[3], chunk);
        if (kind == GATE) return activate(mine, b, cuts[4], chunk);
        if (kind == DOWN) return sum(mine, b.down, cuts[5], chunk);
        return m.dtype == F32 ? attend<F32>(mine, block, chunk)
                              : m.dtype == F16 ? attend<F16>(mine, block, chunk) : attend<BF16>(mine, block, chunk);
    }
    const float* norm(Mine& mine, const NearplaneNorm& by) const {
        mine.normed.resize(size_t(m.hidden));
        normalize(by, s.x.data(), m.hidden, mine.normed.data());
        return mine.normed.data();
    }
    int one_of_three(Mine& mine, const NearplaneBlock& b, const Cut* cut, int64_t chunk) const {
        const NearplaneMatrix* const linears[] = {&b.q, &b.k, &b.v};
        float* const outputs[] = {s.q.data(), s.k.data(), s.v.data()};
        int i = 0;
        for (; chunk >= cut[i].chunks; i++) chunk -= cut[i].chunks;
        const NearplaneMatrix& w = *linears[i];
        return mine.multiply(w, outputs[i], chunk * cut[i].rows, std::min(w.out, (chunk + 1) * cut[i].rows));
    }
    int sum(Mine& mine, const NearplaneMatrix& w, const Cut& cut, int64_t chunk) const {
        const int64_t first = chunk * cut.rows, end = std::min(w.out, first + cut.rows);
        if (mine.multiply(w, s.y.data(), first, end)) return 1;
        for (int64_t i = first; i < end; i++) s.x[size_t(i)] += s.y[size_t(i)] * m.added;
        return 0;
    }
    int activate(Mine& mine, const NearplaneBlock& b, const Cut& cut, int64_t chunk) const {
        const int64_t first = chunk * cut.rows, end = std::min(m.inner, first + cut.rows);
        if (mine.multiply(b.gate, s.gate.data(), first, end) || mine.multiply(b.up, s.up.data(), first, end)) return 1;
        gate(s.gate.data() + first, s.up.data() + first, end - first);
        return 0;
    }
    // Heads that share keys each rotate the token's key for themselves. The first of them stores key and value.
    template <int DTYPE> int attend(Mine& mine, int64_t block, int64_t number_of_head) const {
        const NearplaneBlock& b = m.blocks[block];
        const NearplaneMemory& memory = memories[block];
        const int64_t width = m.width, group = m.heads / m.shared, shared = number_of_head / group, n = seen(block);
        float *q = s.q.data() + number_of_head * width, *v = s.v.data() + shared * width;
        if (b.query.weight != nullptr) normalize(b.query, q, width, q);
        if (b.turns) turn(q, m.turned, cosine, sine);
        mine.key.assign(s.k.data() + shared * width, s.k.data() + (shared + 1) * width);
        float* k = mine.key.data();
        if (b.key.weight != nullptr) normalize(b.key, k, width, k);
        if (b.turns) turn(k, m.turned, cosine, sine);
        const int64_t bytes = width * (DTYPE == F32 ? 4 : 2);
        mine.stored.resize(size_t(2 * bytes));
        char *key = mine.stored.data(), *value = key + bytes;
        write(k, width, key, 0, DTYPE);
        write(v, width, value, 0, DTYPE);
        const int64_t row = shared * capacity + memory.stored;
        if (number_of_head % group == 0) {
            memcpy(static_cast<char*>(memory.keys) + row * bytes, key, size_t(bytes));
            memcpy(static_cast<char*>(memory.values) + row * bytes, value, size_t(bytes));
        }
        const int64_t first = (row + 1 - n) * width;
        const Head<DTYPE> head{from(memory.keys, first, DTYPE), from(memory.values, first, DTYPE), key, value, n, width, m.scale};
        head.attend(q, s.scores.data() + number_of_head * whole(n), s.mixed.data() + number_of_head * width);
        return 0;
    }
    int last(Mine& mine, const Cut& cut, int64_t chunk) const {
        const NearplaneMatrix& w = m.head;
        const int64_t first = chunk * cut.rows, end = std::min(w.out, first + cut.rows);
        if (mine.multiply(w, y, first, end)) return 1;
        if (divided != 1.f)
            for (int64_t i = first; i < end; i++) y[i] /= divided;
        if (dtype != F32) write(y + first, end - first, logits, first, dtype);
        return 0;
    }
};

uint64_t next_number() {
    static std::atomic<uint64_t> tokens{0};
    return tokens.fetch_add(1, std::memory_order_relaxed) + 1;
}
Scratch& of_this_thread() {  // kept from token to token
    static thread_local Scratch scratch;
    return scratch;
}

}  // namespace

extern "C" {

// Writes the logits [vocabulary], float32, of a last hidden state: what a benchmark of the head times. Returns as below.
int nearplane_head(const NearplaneDecoder* decoder, const float* hidden, float* logits, int threads) {
    Scratch& s = of_this_thread();
    try {
        s.fit(*decoder, 0);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    Token t{*decoder, nullptr, 0, nullptr, nullptr, s, hidden, logits, logits, 0, F32, 1.f, next_number()};
    const int64_t products = t.plan(true);
    return nearplane_steps(Token::work, &t, s.chunks.data(), 1, products, threads);
}

// Writes the logits [vocabulary] of the token behind what the memories [blocks] hold, and its keys and values into them.
// Where `last` is not null, writes there the hidden state [hidden] that the head would read, in float32, and no logits.
// Each memory has room for `capacity` positions, and `cosine` and `sine` [turned] are those of the token's position.
// Returns 0; 1 where memory runs out. The arguments are checked by the caller (decode.py).
int nearplane_decode(const NearplaneDecoder* decoder, const NearplaneMemory* memories, int64_t capacity, int64_t token,
                     const float* cosine, const float* sine, void* logits, float* last, int threads) {
    const NearplaneDecoder& m = *decoder;
    Scratch& s = of_this_thread();
    try {
        s.fit(m, capacity);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    for (int64_t i = 0; i < m.hidden; i++)
        s.x[size_t(i)] = element(m.embedding.dense, token * m.hidden + i, m.embedding.dtype) * m.embedded;
    float* y = m.dtype == F32 ? static_cast<float*>(logits) : s.logits.data();
    Token t{m, memories, capacity, cosine, sine, s, nullptr, y, logits, m.count, m.dtype, m.divided, next_number()};
    const int64_t products = t.plan(last == nullptr), steps = STEPS * m.count + (last == nullptr ? 1 : 0);
    if (nearplane_steps(Token::work, &t, s.chunks.data(), steps, products, threads)) return 1;
    if (last != nullptr) normalize(m.last, s.x.data(), m.hidden, last);
    return 0;
}
}
