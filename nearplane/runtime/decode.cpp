// One token through a whole decoder on a CPU: everything between the linears that kernel.cpp multiplies. A C ABI.
//
// Decides: in which order a decoder block of the standard kind computes, and that nothing of it leaves C++ between two
// tokens. standard.py finds out whether a model's blocks are of that kind, and decode.py has the twins of these structs.
// Everything is computed in float32, whatever the dtype of weights, keys and values.
//
// A block: norm, q, k, v, norms of q and k (or none), rotation, attention, o, sum; norm, gate, up, silu(gate) * up, down, sum.
// Work is shared out by output channels and by heads, each of which one thread computes alone: results do not depend on the
// number of threads, to the bit.

#include <algorithm>
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

struct NearplaneWeight;  // of kernel.cpp

extern "C" {
int nearplane_linear(const NearplaneWeight* w, const void* x, int64_t rows, int64_t stride, int dtype, const void* bias,
                     int bias_dtype, void* y, int path, int threads);
int nearplane_share(void (*work)(void*, int64_t), void* context, int64_t chunks, int threads);

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
    for (int r = 0; r < ROWS; r++) {
        y[r] = total(sums[r][0] + sums[r][1]);
        for (int64_t j = i; j < n; j++) y[r] += element(p, r * stride + j, DTYPE) * x[j];
    }
}

struct Shared {  // a product with a dense weight, shared out by rows
    const NearplaneMatrix* w;
    const float* x;
    float* y;
    int64_t rows;  // of a chunk

    template <int DTYPE> void some(int64_t chunk) const {
        const int64_t end = std::min(w->out, (chunk + 1) * rows);
        int64_t row = chunk * rows;
        for (; row + 2 <= end; row += 2) dots<DTYPE, 2>(from(w->dense, row * w->in, DTYPE), w->in, x, w->in, y + row);
        for (; row < end; row++) dots<DTYPE, 1>(from(w->dense, row * w->in, DTYPE), w->in, x, w->in, y + row);
        for (row = chunk * rows; w->bias != nullptr && row < end; row++) y[row] += element(w->bias, row, w->bias_dtype);
    }
    static void work(void* context, int64_t chunk) {
        const Shared& s = *static_cast<Shared*>(context);
        if (s.w->dtype == F32) s.some<F32>(chunk);
        else if (s.w->dtype == F16) s.some<F16>(chunk);
        else s.some<BF16>(chunk);
    }
};

constexpr int64_t CHUNK_BYTES = 1 << 17;  // of a dense weight: some 5 microseconds
constexpr int64_t ALONE = 1 << 18;        // products that are done before another thread has woken

int multiply(const NearplaneMatrix& w, const float* x, float* y, int threads) {
    if (w.packed != nullptr) return nearplane_linear(w.packed, x, 1, w.in, F32, w.bias, w.bias_dtype, y, w.path, threads);
    const int64_t bytes = w.in * (w.dtype == F32 ? 4 : 2);
    Shared shared{&w, x, y, std::max<int64_t>(4, CHUNK_BYTES / bytes)};
    return nearplane_share(Shared::work, &shared, (w.out + shared.rows - 1) / shared.rows, w.out * w.in < ALONE ? 1 : threads);
}

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

struct Attention {  // shared out by heads of keys
    const NearplaneDecoder* model;
    const void *keys, *values;
    int64_t first, end, capacity;
    const float* q;
    float *scores, *out;  // scores [heads, padded]
    int64_t padded;

    template <int DTYPE> void head(int64_t shared) const {
        const NearplaneDecoder& m = *model;
        const int64_t group = m.heads / m.shared, width = m.width, n = end - first;
        const void* k = from(keys, (shared * capacity + first) * width, DTYPE);
        const void* v = from(values, (shared * capacity + first) * width, DTYPE);
        for (int64_t g = 0; g < group; g++) {
            const int64_t number = shared * group + g;
            float *score = scores + number * padded, *y = out + number * width;
            int64_t t = 0;
            for (; t + 4 <= n; t += 4) dots<DTYPE, 4>(from(k, t * width, DTYPE), width, q + number * width, width, score + t);
            for (; t < n; t++) dots<DTYPE, 1>(from(k, t * width, DTYPE), width, q + number * width, width, score + t);
            float most = score[0];
            for (t = 1; t < n; t++) most = score[t] > most || score[t] != score[t] ? score[t] : most;
            for (t = n; t < padded && t < n + LANES; t++) score[t] = -INFINITY;
            Real sums{};
            for (t = 0; t < n; t += LANES) {
                const Real e = exponential((get<Real>(score + t) - most) * m.scale);
                put(score + t, e);
                sums += e;
            }
            const float inverse = 1.f / total(sums);
            mix<DTYPE>(score, v, n, width, inverse, y);
        }
    }
    template <int DTYPE> static INLINE void mix(const float* score, const void* v, int64_t n, int64_t width, float by, float* y) {
        int64_t i = 0;
        for (; i + 4 * LANES <= width; i += 4 * LANES) columns<DTYPE, 4>(score, v, n, width, i, by, y);
        for (; i + LANES <= width; i += LANES) columns<DTYPE, 1>(score, v, n, width, i, by, y);
        for (; i < width; i++) {
            float sum = 0.f;
            for (int64_t t = 0; t < n; t++) sum += score[t] * element(v, t * width + i, DTYPE);
            y[i] = sum * by;
        }
    }
    template <int DTYPE, int PARTS>
    static INLINE void columns(const float* score, const void* v, int64_t n, int64_t width, int64_t i, float by, float* y) {
        Real sums[PARTS] = {};
        for (int64_t t = 0; t < n; t++)
            for (int p = 0; p < PARTS; p++) sums[p] += wide<DTYPE>(from(v, t * width + i + p * LANES, DTYPE)) * score[t];
        for (int p = 0; p < PARTS; p++) put(y + i + p * LANES, sums[p] * by);
    }
    static void work(void* context, int64_t shared) {
        const Attention& a = *static_cast<Attention*>(context);
        if (a.model->dtype == F32) a.head<F32>(shared);
        else if (a.model->dtype == F16) a.head<F16>(shared);
        else a.head<BF16>(shared);
    }
};

INLINE int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// What a token needs on its way.
struct Scratch {
    std::vector<float> x, y, q, k, v, mixed, gate, up, scores, logits;

    void fit(const NearplaneDecoder& m, int64_t positions) {
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

void add(float* x, const float* y, int64_t n, float by) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i] * by;
}

int attend(const NearplaneDecoder& m, const NearplaneBlock& b, const NearplaneMemory& memory, int64_t capacity,
           const float* cosine, const float* sine, Scratch& s, int threads) {
    normalize(b.before, s.x.data(), m.hidden, s.y.data());
    if (multiply(b.q, s.y.data(), s.q.data(), threads) || multiply(b.k, s.y.data(), s.k.data(), threads) ||
        multiply(b.v, s.y.data(), s.v.data(), threads))
        return 1;
    const int64_t stored = memory.stored, width = m.width;
    for (int64_t h = 0; h < m.heads; h++) {
        float* q = s.q.data() + h * width;
        if (b.query.weight != nullptr) normalize(b.query, q, width, q);
        if (b.turns) turn(q, m.turned, cosine, sine);
    }
    for (int64_t h = 0; h < m.shared; h++) {
        float* k = s.k.data() + h * width;
        if (b.key.weight != nullptr) normalize(b.key, k, width, k);
        if (b.turns) turn(k, m.turned, cosine, sine);
        write(k, width, memory.keys, (h * capacity + stored) * width, m.dtype);
        write(s.v.data() + h * width, width, memory.values, (h * capacity + stored) * width, m.dtype);
    }
    const int64_t end = stored + 1, first = b.window > 0 && end > b.window ? end - b.window : 0;
    Attention a{&m, memory.keys, memory.values, first, end, capacity, s.q.data(), s.scores.data(), s.mixed.data(),
                whole(end - first)};
    const bool alone = (end - first) * width * m.heads < ALONE;
    if (nearplane_share(Attention::work, &a, m.shared, alone ? 1 : threads)) return 1;
    if (multiply(b.o, s.mixed.data(), s.y.data(), threads)) return 1;
    add(s.x.data(), s.y.data(), m.hidden, m.added);
    return 0;
}

int feed(const NearplaneDecoder& m, const NearplaneBlock& b, Scratch& s, int threads) {
    normalize(b.after, s.x.data(), m.hidden, s.y.data());
    if (multiply(b.gate, s.y.data(), s.gate.data(), threads) || multiply(b.up, s.y.data(), s.up.data(), threads)) return 1;
    gate(s.gate.data(), s.up.data(), m.inner);
    if (multiply(b.down, s.up.data(), s.y.data(), threads)) return 1;
    add(s.x.data(), s.y.data(), m.hidden, m.added);
    return 0;
}

}  // namespace

extern "C" {

// Writes the logits [vocabulary], float32, of a last hidden state: what a benchmark of the head times. Returns as below.
int nearplane_head(const NearplaneDecoder* decoder, const float* hidden, float* logits, int threads) {
    return multiply(decoder->head, hidden, logits, threads);
}

// Writes the logits [vocabulary] of the token behind what the memories [blocks] hold, and its keys and values into them.
// Where `last` is not null, writes there the hidden state [hidden] that the head would read, in float32, and no logits.
// Each memory has room for `capacity` positions, and `cosine` and `sine` [turned] are those of the token's position.
// Returns 0; 1 where memory runs out. The arguments are checked by the caller (decode.py).
int nearplane_decode(const NearplaneDecoder* decoder, const NearplaneMemory* memories, int64_t capacity, int64_t token,
                     const float* cosine, const float* sine, void* logits, float* last, int threads) {
    static thread_local Scratch s;  // kept from token to token
    const NearplaneDecoder& m = *decoder;
    try {
        s.fit(m, capacity);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    for (int64_t i = 0; i < m.hidden; i++)
        s.x[size_t(i)] = element(m.embedding.dense, token * m.hidden + i, m.embedding.dtype) * m.embedded;
    for (int64_t i = 0; i < m.count; i++)
        if (attend(m, m.blocks[i], memories[i], capacity, cosine, sine, s, threads) || feed(m, m.blocks[i], s, threads)) return 1;
    normalize(m.last, s.x.data(), m.hidden, s.y.data());
    if (last != nullptr) {
        memcpy(last, s.y.data(), size_t(m.hidden) * 4);
        return 0;
    }
    float* y = m.dtype == F32 ? static_cast<float*>(logits) : s.logits.data();
    if (multiply(m.head, s.y.data(), y, threads)) return 1;
    if (m.divided != 1.f)
        for (int64_t i = 0; i < m.head.out; i++) y[i] /= m.divided;
    if (m.dtype != F32) write(y, m.head.out, logits, 0, m.dtype);
    return 0;
}
}
