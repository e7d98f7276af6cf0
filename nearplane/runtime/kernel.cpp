// y = x W^T + bias with W packed in 2 to 8 bits, on a CPU. Compiled once per instruction set (NEARPLANE_ISA); a C ABI.
//
// Decides: how codes are multiplied without being turned into floats. threads.cpp decides who does which part of the work.
// layout.py says how W lies in memory: tiles of 16 output channels, blocks of 32 inputs; a block has 8 steps, and the
// bytes of a dword are one channel's codes for the 4 inputs of a step. So one vector holds 16 channels x 4 inputs, an
// activation dword is broadcast to all of them, and every lane sums its own channel: no sum across lanes, ever.
//
// Arithmetic (the bounds are tested): "exact" multiplies floats. "a16" and "a8" round each run of 128 (32) activations
// to integers of its own scale, 16 bits as two balanced base-255 digits or 8 bits as one, and multiply those with the
// codes exactly. The zero point enters once per run, through the run's activation sum.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#define ISA_PORTABLE 0
#define ISA_AVX2 1
#define ISA_AVX512 2
#ifndef NEARPLANE_ISA
#define NEARPLANE_ISA ISA_PORTABLE
#endif
#if NEARPLANE_ISA != ISA_PORTABLE && !defined(NEARPLANE_EMULATED)  // the tests compile the AVX-512 part over plain arrays
#include <immintrin.h>
#endif
#define INLINE inline __attribute__((always_inline))
#if NEARPLANE_ISA == ISA_PORTABLE || defined(NEARPLANE_EMULATED)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
// Sums are to be taken as they are written: compilers collect the products first, and then run out of registers.
#if NEARPLANE_ISA != ISA_PORTABLE && !defined(NEARPLANE_EMULATED)
#define KEEP(x) asm("" : "+v"(x))
#else
#define KEEP(x) (void)0
#endif

namespace {

constexpr int TILE = 16;    // output channels
constexpr int BLOCK = 32;   // inputs
constexpr int STEPS = 8;    // dwords of a block, 4 inputs each
constexpr int DIGIT = 127;  // largest digit of an activation
constexpr int BASE = 255;   // a16: value = 255 * high + low, both in [-127, 127]
#ifndef AHEAD  // bytes that are asked for before their turn: as many as are under way at the full rate, and some
#define AHEAD (NEARPLANE_ISA == ISA_AVX512 ? 8192 : 4096)
#endif
#ifndef GROUPS_AHEAD
#define GROUPS_AHEAD 16
#endif

INLINE float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint32_t to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
INLINE float from_half(uint16_t h) {  // exponents are rebased by one multiplication, which also handles subnormals
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    const float scaled = from_bits(rest) * 0x1p112f;
    return from_bits(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : to_bits(scaled)));
}

// What the instruction sets have to offer, one struct each, all with the same members:
// Codes  16 channels x 4 unsigned bytes      Part  sums of products, as narrow as a few steps allow
// Sum    16 int32                            Real  16 floats

#if NEARPLANE_ISA == ISA_AVX512

struct Arch {
    using Codes = __m512i;
    using Part = __m512i;
    using Sum = __m512i;
    using Real = __m512;
    static constexpr bool IN_PLACE = true;  // one row: codes are masked where they lie, see InPlace
    static constexpr int ROWS = 8;  // rows of x that share an unpacked weight, a8; half of it for a16
    template <int BITS> static constexpr int OFFSET = 0;
    template <int BITS> static constexpr bool WORDS = false;  // a16 as 16-bit words instead of two digits
    template <int BITS> static constexpr int NARROW = STEPS;  // steps after which a Part must be widened

    static INLINE Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static INLINE void store(uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }
    static INLINE Codes shifted(Codes c, int right) {  // bits of the neighbour come in; right < 0: to the left
        return right < 0 ? _mm512_slli_epi16(c, unsigned(-right)) : right > 0 ? _mm512_srli_epi16(c, unsigned(right)) : c;
    }
    static INLINE Codes field(Codes c, int right, int mask) {  // (c >> right) & mask in each byte
        return _mm512_and_si512(shifted(c, right), _mm512_set1_epi8(char(mask)));
    }
    static INLINE Codes choose(int mask, Codes a, Codes b) {  // bits of a where the mask has them, else of b
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(char(mask)), a, b, 0xca);
    }
    static INLINE Codes join(Codes a, Codes b) { return _mm512_or_si512(a, b); }
    static INLINE Sum plus(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static INLINE Sum down(Sum s, int bits) { return _mm512_srai_epi32(s, unsigned(bits)); }
    static INLINE Part no_part() { return _mm512_setzero_si512(); }
    template <int BITS> static INLINE void dot(Part& part, Codes c, int32_t digits) {
        part = _mm512_dpbusd_epi32(part, c, _mm512_set1_epi32(digits));
        KEEP(part);
    }
    static INLINE Sum no_sum() { return _mm512_setzero_si512(); }
    template <int BITS> static INLINE void widen(Sum& sum, Part& part) {
        sum = _mm512_add_epi32(sum, part);
        part = no_part();
    }
    static INLINE Real real(Sum s) { return _mm512_cvtepi32_ps(s); }
    static INLINE Real code(Codes c, int byte) {  // the codes of one of the four inputs
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(c, 8 * byte), _mm512_set1_epi32(255)));
    }
    static INLINE Real all(float x) { return _mm512_set1_ps(x); }
    static INLINE Real add(Real a, Real b) { return _mm512_add_ps(a, b); }
    static INLINE Real sub(Real a, Real b) { return _mm512_sub_ps(a, b); }
    static INLINE Real mul(Real a, Real b) { return _mm512_mul_ps(a, b); }
    static INLINE Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
    static INLINE Real get(const float* p) { return _mm512_loadu_ps(p); }
    static INLINE Real halves(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static INLINE Real bfloats(const uint16_t* p) {
        const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16));
    }
    static INLINE Real bytes(const uint8_t* p) {
        return real(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static INLINE void put(float* p, Real a) { _mm512_storeu_ps(p, a); }
};

#elif NEARPLANE_ISA == ISA_AVX2

struct Arch {
    struct Codes {
        __m256i a, b;
    };
    using Part = Codes;  // int16
    using Sum = Codes;   // int32
    struct Real {
        __m256 a, b;
    };
    static constexpr bool IN_PLACE = false;
    static constexpr int ROWS = 4;
    // vpmaddubsw saturates beyond 32767. Full bytes are therefore taken as code - 128, whose sign moves to the digit.
    template <int BITS> static constexpr int OFFSET = BITS == 8 ? 128 : 0;
    template <int BITS> static constexpr int NARROW = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    // Where every product of bytes must be widened at once, products of words are cheaper.
    template <int BITS> static constexpr bool WORDS = NARROW<BITS> == 1;

    static INLINE __m256i half(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static INLINE Codes load(const uint8_t* p) { return {half(p), half(p + 32)}; }
    static INLINE void store(uint8_t* p, Codes c) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), c.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), c.b);
    }
    static INLINE Codes field(Codes c, int right, int mask) {
        const __m256i m = _mm256_set1_epi8(char(mask));
        if (right < 0)
            return {_mm256_and_si256(_mm256_slli_epi16(c.a, -right), m), _mm256_and_si256(_mm256_slli_epi16(c.b, -right), m)};
        return {_mm256_and_si256(_mm256_srli_epi16(c.a, right), m), _mm256_and_si256(_mm256_srli_epi16(c.b, right), m)};
    }
    static INLINE Codes join(Codes x, Codes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
    static INLINE Part no_part() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    template <int BITS> static INLINE __m256i pairs(__m256i c, __m256i d) {
        if constexpr (BITS == 8) {
            const __m256i centred = _mm256_xor_si256(c, _mm256_set1_epi8(char(128)));
            return _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(d, centred));
        }
        return _mm256_maddubs_epi16(c, d);
    }
    template <int BITS> static INLINE void dot(Part& part, Codes c, int32_t digits) {
        const __m256i d = _mm256_set1_epi32(digits);
        part.a = _mm256_add_epi16(part.a, pairs<BITS>(c.a, d));
        part.b = _mm256_add_epi16(part.b, pairs<BITS>(c.b, d));
        KEEP(part.a);
        KEEP(part.b);
    }
    static INLINE Sum no_sum() { return no_part(); }
    static INLINE void dot_words(Sum& sum, Codes c, int32_t even, int32_t odd) {  // words of inputs 0 and 2, 1 and 3
        const __m256i m = _mm256_set1_epi16(255), e = _mm256_set1_epi32(even), o = _mm256_set1_epi32(odd);
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_and_si256(c.a, m), e));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_and_si256(c.b, m), e));
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_srli_epi16(c.a, 8), o));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_srli_epi16(c.b, 8), o));
        KEEP(sum.a);
        KEEP(sum.b);
    }
    template <int BITS> static INLINE void widen(Sum& sum, Part& part) {
        const __m256i ones = _mm256_set1_epi16(1);
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(part.a, ones));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(part.b, ones));
        part = no_part();
    }
    static INLINE Real real(Sum s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
    static INLINE Real code(Codes c, int byte) {
        const __m256i m = _mm256_set1_epi32(255);
        return real({_mm256_and_si256(_mm256_srli_epi32(c.a, 8 * byte), m),
                     _mm256_and_si256(_mm256_srli_epi32(c.b, 8 * byte), m)});
    }
    static INLINE Real all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static INLINE Real add(Real x, Real y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static INLINE Real sub(Real x, Real y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static INLINE Real mul(Real x, Real y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static INLINE Real fma(Real x, Real y, Real z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static INLINE Real get(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static INLINE __m128i low(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static INLINE Real halves(const uint16_t* p) { return {_mm256_cvtph_ps(low(p)), _mm256_cvtph_ps(low(p + 8))}; }
    static INLINE Real bfloats(const uint16_t* p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low(p)), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low(p + 8)), 16))};
    }
    static INLINE Real bytes(const uint8_t* p) {
        const __m128i u = low(p);
        return real({_mm256_cvtepu8_epi32(u), _mm256_cvtepu8_epi32(_mm_srli_si128(u, 8))});
    }
    static INLINE void put(float* p, Real x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
};

#else  // plain C++, written so that a compiler can use what vectors there are

struct Arch {
    struct Codes {
        uint8_t v[4 * TILE];
    };
    struct Sum {
        int32_t v[TILE];
    };
    using Part = Sum;
    struct Real {
        float v[TILE];
    };
    static constexpr bool IN_PLACE = false;
    static constexpr int ROWS = 2;
    template <int BITS> static constexpr int OFFSET = 0;
    template <int BITS> static constexpr bool WORDS = false;
    template <int BITS> static constexpr int NARROW = STEPS;

    static INLINE Codes load(const uint8_t* p) {
        Codes c;
        memcpy(c.v, p, sizeof c.v);
        return c;
    }
    static INLINE void store(uint8_t* p, Codes c) { memcpy(p, c.v, sizeof c.v); }
    static INLINE Codes field(Codes c, int right, int mask) {
        for (auto& x : c.v) x = uint8_t((right < 0 ? x << -right : x >> right) & mask);
        return c;
    }
    static INLINE Codes join(Codes a, Codes b) {
        for (int i = 0; i < 4 * TILE; i++) a.v[i] = uint8_t(a.v[i] | b.v[i]);
        return a;
    }
    static INLINE Part no_part() { return {}; }
    template <int BITS> static INLINE void dot(Part& part, Codes c, int32_t digits) {
        int8_t d[4];
        memcpy(d, &digits, 4);
        for (int i = 0; i < TILE; i++)
            part.v[i] += c.v[4 * i] * d[0] + c.v[4 * i + 1] * d[1] + c.v[4 * i + 2] * d[2] + c.v[4 * i + 3] * d[3];
    }
    static INLINE Sum no_sum() { return {}; }
    template <int BITS> static INLINE void widen(Sum& sum, Part& part) {
        for (int i = 0; i < TILE; i++) sum.v[i] += part.v[i];
        part = {};
    }
    static INLINE Real real(Sum s) {
        Real r;
        for (int i = 0; i < TILE; i++) r.v[i] = float(s.v[i]);
        return r;
    }
    static INLINE Real code(Codes c, int byte) {
        Real r;
        for (int i = 0; i < TILE; i++) r.v[i] = float(c.v[4 * i + byte]);
        return r;
    }
    template <class F> static INLINE Real each(F f) {
        Real r;
        for (int i = 0; i < TILE; i++) r.v[i] = f(i);
        return r;
    }
    static INLINE Real all(float x) { return each([&](int) { return x; }); }
    static INLINE Real add(Real a, Real b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
    static INLINE Real sub(Real a, Real b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
    static INLINE Real mul(Real a, Real b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
    static INLINE Real fma(Real a, Real b, Real c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static INLINE Real get(const float* p) { return each([&](int i) { return p[i]; }); }
    static INLINE Real halves(const uint16_t* p) { return each([&](int i) { return from_half(p[i]); }); }
    static INLINE Real bfloats(const uint16_t* p) { return each([&](int i) { return from_bits(uint32_t(p[i]) << 16); }); }
    static INLINE Real bytes(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }
    static INLINE void put(float* p, Real a) { memcpy(p, a.v, sizeof a.v); }
};

#endif

using Codes = Arch::Codes;
using Real = Arch::Real;

// Where the codes of a step come from. A block of b bits is planes of 4, 2 and 1 bits, as b is written in binary;
// planes of 8 bits are the codes themselves.
template <int BITS> struct Packed {
    static constexpr bool FAR = true;  // comes from memory
    static constexpr int BYTES = 64 * BITS;  // of a block of a tile
    static INLINE Codes codes(const uint8_t* block, int step) {
        if constexpr (BITS == 8) return Arch::load(block + 64 * step);
        constexpr int TWO = BITS & 4 ? 256 : 0, ONE = TWO + (BITS & 2 ? 128 : 0);  // where planes begin
        Codes found{};
        if constexpr ((BITS & 4) != 0) found = Arch::field(Arch::load(block + 64 * (step / 2)), 4 * (step % 2), 15);
        if constexpr ((BITS & 2) != 0) {
            constexpr int AT = BITS & 4;
            const Codes two = Arch::field(Arch::load(block + TWO + 64 * (step / 4)), 2 * (step % 4) - AT, 3 << AT);
            found = AT ? Arch::join(found, two) : two;
        }
        if constexpr ((BITS & 1) != 0) {
            constexpr int AT = BITS & 6;
            found = Arch::join(found, Arch::field(Arch::load(block + ONE), step - AT, 1 << AT));
        }
        return found;
    }
};

// The same codes after they were unpacked, for several rows of x.
template <int BITS> struct Unpacked {
    static constexpr bool FAR = false;
    static constexpr int BYTES = 64 * STEPS;
    static INLINE Codes codes(const uint8_t* block, int step) { return Arch::load(block + 64 * step); }
};

// ------------------------------------------------------------------------------------------------ numbers

enum Dtype { F32 = 0, F16 = 1, BF16 = 2 };
enum Path { EXACT = 0, A16 = 1, A8 = 2 };

INLINE uint16_t to_half(float f) {  // to nearest, ties to even
    const uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) return uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) & 0x7fff));  // subnormal: units of 2^-24
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}
INLINE uint16_t to_bfloat(float f) {
    const uint32_t u = to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE float element(const void* p, int64_t i, int dtype) {
    if (dtype == F32) return static_cast<const float*>(p)[i];
    const uint16_t u = static_cast<const uint16_t*>(p)[i];
    return dtype == F16 ? from_half(u) : from_bits(uint32_t(u) << 16);
}

}  // namespace

extern "C" struct NearplaneWeight {  // the twin of this struct is in cpu.py
    const uint8_t* codes;            // [tiles, positions / 32, 64 * bits]
    const void* scales;              // [tiles, groups, 16]
    const void* zeros;               // [tiles, groups, 16], bytes, or floats where `free`; or null: `zero` everywhere
    const int32_t* order;            // [positions]: input of each position, -1 for none; or null: position = input
    int64_t out, in, positions, groups, span;  // span: positions of a group; the last may have fewer
    int32_t bits, zero, scale_dtype, free;
};

extern "C" int nearplane_steps(int (*work)(void*, int64_t, int64_t), void* context, const int64_t* chunks, int64_t steps,
                               int64_t products, int threads);  // of threads.cpp

namespace {

using Weight = NearplaneWeight;

// In what form activations are multiplied: a8 in bytes; a16 in two digits, or in words where Arch::WORDS says so.
enum Form { FLOATS, BYTES, DIGITS, WORDS };
constexpr int planes_of(Form form) { return form == DIGITS ? 2 : 1; }            // sums that are kept apart
constexpr int bytes_of(Form form) { return form == BYTES ? 1 : 2; }              // of one activation
constexpr int run_of(Form form) { return form == BYTES ? 32 : 128; }             // activations that share a scale
constexpr int offset_of(Form form, int offset) { return form == WORDS ? 0 : offset; }  // words take codes as they are

// The rows of x as the kernel wants them.
struct Activations {
    int64_t runs = 0;
    std::vector<float> x;                    // exact: [rows, positions]
    std::vector<int8_t> digits;              // [rows, planes, positions], or words [rows, positions], of four: 0, 2, 1, 3
    std::vector<float> scale, sum;           // [rows, runs], [rows, runs, planes]
};

// Runs are parts of groups: f(first position, end, group), in order.
template <class F> INLINE void for_runs(const Weight& w, int length, F&& f) {
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t first = g * w.span, end = first + w.span < w.positions ? first + w.span : w.positions;
        for (int64_t a = first; a < end; a += length) f(a, a + length < end ? a + length : end, g);
    }
}

void gather(const Weight& w, const void* x, int64_t row, int64_t stride, int dtype, float* out) {
    const int64_t from = row * stride;
    if (w.order != nullptr) {
        for (int64_t i = 0; i < w.positions; i++) out[i] = w.order[i] < 0 ? 0.f : element(x, from + w.order[i], dtype);
        return;
    }
    if (dtype == F32) {
        memcpy(out, static_cast<const float*>(x) + from, size_t(w.in) * 4);
    } else if (dtype == F16) {
        const uint16_t* p = static_cast<const uint16_t*>(x) + from;
        for (int64_t i = 0; i < w.in; i++) out[i] = from_half(p[i]);
    } else {
        const uint16_t* p = static_cast<const uint16_t*>(x) + from;
        for (int64_t i = 0; i < w.in; i++) out[i] = from_bits(uint32_t(p[i]) << 16);
    }
    for (int64_t i = w.in; i < w.positions; i++) out[i] = 0.f;
}

// Largest magnitude, by the integer order of its bits: NaN and Inf come out on top, and integers need no order of sums.
float magnitude(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = to_bits(x[i]) & 0x7fffffff;
        most = u > most ? u : most;
    }
    return from_bits(most);
}

template <Form FORM> void digitize(const float* x, int64_t n, int8_t* digits, int64_t plane, float* scale, float* sum) {
    constexpr float FULL = FORM == BYTES ? float(DIGIT) : float(DIGIT * (BASE + 1));
    const float most = magnitude(x, n);
    // A NaN or Inf makes its row NaN, as it would (nearly) everywhere in a dense product. Below 1e-30 a run counts as zero.
    const bool finite = most <= 3.402823466e38f;
    const float inverse = finite && most > 1e-30f ? FULL / most : 0.f;
    *scale = finite ? most / FULL : from_bits(0x7fc00000);
    int32_t total[2] = {0, 0};
    for (int64_t i = 0; i < n; i++) {
        const float value = finite ? __builtin_rintf(x[i] * inverse) : 0.f;
        if constexpr (FORM == DIGITS) {
            const float high = __builtin_rintf(value * (1.f / BASE));
            const int32_t h = int32_t(high), l = int32_t(value - BASE * high);
            digits[i] = int8_t(h);
            digits[plane + i] = int8_t(l);
            total[0] += h;
            total[1] += l;
        } else if constexpr (FORM == WORDS) {
            const int16_t word = int16_t(int32_t(value));
            memcpy(digits + 2 * i, &word, 2);
            total[0] += word;
        } else {
            digits[i] = int8_t(int32_t(value));
            total[0] += int32_t(value);
        }
    }
    for (int64_t i = 0; FORM == WORDS && i < n; i += 4) {  // 0, 1, 2, 3 to 0, 2, 1, 3
        uint64_t four;
        memcpy(&four, digits + 2 * i, 8);
        four = (four & 0xffff00000000ffff) | (four & 0xffff0000) << 16 | (four >> 16 & 0xffff0000);
        memcpy(digits + 2 * i, &four, 8);
    }
    for (int p = 0; p < planes_of(FORM); p++) sum[p] = float(total[p]);
}

template <Form FORM> void prepare(const Weight& w, const void* x, int64_t rows, int64_t stride, int dtype, Activations& a) {
    constexpr int PLANES = planes_of(FORM), BYTES_EACH = bytes_of(FORM);
    if constexpr (FORM == FLOATS) {
        a.x.resize(size_t(rows * w.positions));
        for (int64_t r = 0; r < rows; r++) gather(w, x, r, stride, dtype, a.x.data() + r * w.positions);
    } else {
        a.runs = 0;
        for_runs(w, run_of(FORM), [&](int64_t, int64_t, int64_t) { a.runs++; });
        a.x.resize(size_t(w.positions));
        a.digits.resize(size_t(rows * BYTES_EACH * w.positions));
        a.scale.resize(size_t(rows * a.runs));
        a.sum.resize(size_t(rows * a.runs * PLANES));
        for (int64_t r = 0; r < rows; r++) {
            gather(w, x, r, stride, dtype, a.x.data());
            int64_t run = r * a.runs;
            for_runs(w, run_of(FORM), [&](int64_t from, int64_t end, int64_t) {
                int8_t* digits = a.digits.data() + r * BYTES_EACH * w.positions + (FORM == WORDS ? 2 : 1) * from;
                digitize<FORM>(a.x.data() + from, end - from, digits, w.positions, &a.scale[size_t(run)],
                               &a.sum[size_t(run * PLANES)]);
                run++;
            });
        }
    }
}

// ------------------------------------------------------------------------------------------------ the product

INLINE Real scales_of(const Weight& w, int64_t tile, int64_t group) {
    const int64_t at = (tile * w.groups + group) * TILE;
    if (w.scale_dtype == F32) return Arch::get(static_cast<const float*>(w.scales) + at);
    const uint16_t* p = static_cast<const uint16_t*>(w.scales) + at;
    return w.scale_dtype == F16 ? Arch::halves(p) : Arch::bfloats(p);
}

INLINE Real zeros_of(const Weight& w, int64_t tile, int64_t group) {
    const int64_t at = (tile * w.groups + group) * TILE;
    if (w.zeros == nullptr) return Arch::all(float(w.zero));
    return w.free ? Arch::get(static_cast<const float*>(w.zeros) + at) : Arch::bytes(static_cast<const uint8_t*>(w.zeros) + at);
}

// A group's scales and zeros are too few bytes for the hardware to see a stream in them.
INLINE void ask_for(const Weight& w, int64_t tile, int64_t group) {
    const int64_t at = (tile * w.groups + group + GROUPS_AHEAD) * TILE;
    __builtin_prefetch(static_cast<const uint8_t*>(w.scales) + at * (w.scale_dtype == F32 ? 4 : 2));
    if (w.zeros != nullptr) __builtin_prefetch(static_cast<const uint8_t*>(w.zeros) + at * (w.free ? 4 : 1));
}

template <int BITS> struct ArchOf {  // looked into only where WORDS is: not every Arch has dot_words
    using type = Arch;
};

// Codes for one row of x where products go to 32 bits at once (Arch::IN_PLACE): masked and not shifted, so 2^shift times too
// large. Products are summed by step % KINDS, and shifted once per run. More sums also hide the latency of a product.
template <int BITS> struct InPlace {
    using A = typename ArchOf<BITS>::type;
    static constexpr bool KNOWN = Arch::IN_PLACE && BITS <= 4;
    static constexpr int KINDS = 4;
    static constexpr int shift(int step) {
        return BITS == 2 ? 2 * (step % 4) : BITS == 4 ? 4 * (step % 2) : step % 4 == 3 ? 4 : 2 * (step % 4);
    }
    static INLINE Codes codes(const uint8_t* block, int step) {
        const int at = shift(step);
        const Codes main = A::load(block + 64 * (BITS == 4 ? step / 2 : step / 4));
        if constexpr (BITS != 3) return A::field(main, 0, ((1 << BITS) - 1) << at);
        // The third bit is put above the two. In steps 3 and 7 the two make room for it.
        const Codes third = A::shifted(A::load(block + 128), step - 2 - at);
        return A::field(A::choose(3 << at, step % 4 == 3 ? A::shifted(main, 2) : main, third), 0, 7 << at);
    }
};

template <int BITS, int PLANES>
INLINE void sums_in_place(const uint8_t* block, int64_t blocks, const int8_t* digits, int64_t plane, Arch::Sum (&sums)[PLANES]) {
    using From = InPlace<BITS>;
    using A = typename From::A;
    typename A::Sum kinds[From::KINDS][PLANES];
    UNROLL
    for (int k = 0; k < From::KINDS; k++)
        UNROLL
        for (int p = 0; p < PLANES; p++) kinds[k][p] = A::no_sum();
    for (int64_t b = 0; b < blocks; b++, block += 64 * BITS, digits += BLOCK) {
        for (int line = 0; line < 64 * BITS; line += 64) __builtin_prefetch(block + AHEAD + line);
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            const Codes codes = From::codes(block, step);
            UNROLL
            for (int p = 0; p < PLANES; p++) {
                int32_t four;
                memcpy(&four, digits + p * plane + 4 * step, 4);
                A::template dot<BITS>(kinds[step % From::KINDS][p], codes, four);
            }
        }
    }
    UNROLL
    for (int p = 0; p < PLANES; p++) {
        sums[p] = kinds[0][p];
        UNROLL
        for (int k = 1; k < From::KINDS; k++) sums[p] = A::plus(sums[p], A::down(kinds[k][p], From::shift(k)));
    }
}

// Some blocks of one tile, all in one run: sums[row][plane] of code x activation. `row`: bytes between rows of digits.
template <class Source, int BITS, Form FORM, int ROWS, int PLANES>
INLINE void sums_of(const uint8_t* block, int64_t blocks, const int8_t* digits, int64_t row, int64_t plane,
                    Arch::Sum (&sums)[ROWS][PLANES]) {
    constexpr int NARROW = Arch::NARROW<BITS>, WIDTH = FORM == WORDS ? 2 : 1;
    for (int64_t b = 0; b < blocks; b++, block += Source::BYTES, digits += WIDTH * BLOCK) {
        if constexpr (Source::FAR)  // the hardware stops at the end of a page
            for (int line = 0; line < Source::BYTES; line += 64) __builtin_prefetch(block + AHEAD + line);
        [[maybe_unused]] Arch::Part part[ROWS][PLANES];
        UNROLL
        for (int r = 0; r < ROWS; r++)
            UNROLL
            for (int p = 0; p < PLANES; p++) part[r][p] = Arch::no_part();
        UNROLL
        for (int step = 0; step < STEPS; step++) {
            const Codes codes = Source::codes(block, step);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                if constexpr (FORM == WORDS) {
                    int32_t pairs[2];
                    memcpy(pairs, digits + r * row + 8 * step, 8);
                    ArchOf<BITS>::type::dot_words(sums[r][0], codes, pairs[0], pairs[1]);
                } else {
                    UNROLL
                    for (int p = 0; p < PLANES; p++) {
                        int32_t four;
                        memcpy(&four, digits + r * row + p * plane + 4 * step, 4);
                        Arch::dot<BITS>(part[r][p], codes, four);
                        if ((step + 1) % NARROW == 0) Arch::widen<BITS>(sums[r][p], part[r][p]);
                    }
                }
            }
        }
    }
}

// One tile by ROWS rows of x over positions [from, to), which begin and end with runs: added to y [rows, 16 floats].
template <class Source, int BITS, Form FORM, int ROWS>
void integer_tile(const Weight& w, int64_t tile, const uint8_t* codes, const Activations& a, int64_t row, int64_t from,
                  int64_t to, float* y) {
    constexpr int PLANES = planes_of(FORM), WIDTH = FORM == WORDS ? 2 : 1;
    constexpr int64_t RUN = run_of(FORM);
    const int64_t plane = w.positions, apart = bytes_of(FORM) * plane, runs_of_group = (w.span + RUN - 1) / RUN;
    int64_t group = from / w.span, run = group * runs_of_group + (from - group * w.span) / RUN;
    const int8_t* digits = a.digits.data() + row * apart + WIDTH * from;
    Real total[ROWS];
    UNROLL
    for (int r = 0; r < ROWS; r++) total[r] = Arch::get(y + r * TILE);
    for (int64_t first = from; first < to; group++) {
        if constexpr (Source::FAR) ask_for(w, tile, group);
        const Real scale = scales_of(w, tile, group);
        const Real zero = Arch::sub(zeros_of(w, tile, group), Arch::all(float(offset_of(FORM, Arch::OFFSET<BITS>))));
        const int64_t end = (group + 1) * w.span < to ? (group + 1) * w.span : to;
        Real part[ROWS];
        UNROLL
        for (int r = 0; r < ROWS; r++) part[r] = Arch::all(0.f);
        for (; first < end; run++) {
            const int64_t length = end - first < RUN ? end - first : RUN;
            Arch::Sum sums[ROWS][PLANES];
            UNROLL
            for (int r = 0; r < ROWS; r++)
                UNROLL
                for (int p = 0; p < PLANES; p++) sums[r][p] = Arch::no_sum();
            if constexpr (ROWS == 1 && Source::FAR && InPlace<BITS>::KNOWN)
                sums_in_place<BITS>(codes, length / BLOCK, digits, plane, sums[0]);
            else
                sums_of<Source, BITS, FORM, ROWS>(codes, length / BLOCK, digits, apart, plane, sums);
            const float *scales = a.scale.data() + row * a.runs + run, *digit_sums = a.sum.data() + (row * a.runs + run) * PLANES;
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                Real value{};
                UNROLL
                for (int p = 0; p < PLANES; p++) {  // of bytes below 2^24, so floats are exact up to here
                    const Real shift = Arch::all(-digit_sums[r * a.runs * PLANES + p]);
                    const Real centred = Arch::fma(zero, shift, Arch::real(sums[r][p]));
                    value = p == 0 ? centred : Arch::fma(value, Arch::all(float(BASE)), centred);
                }
                part[r] = Arch::fma(value, Arch::all(scales[r * a.runs]), part[r]);
            }
            first += length;
            digits += WIDTH * length;
            codes += length / BLOCK * Source::BYTES;
        }
        UNROLL
        for (int r = 0; r < ROWS; r++) total[r] = Arch::fma(part[r], scale, total[r]);
    }
    UNROLL
    for (int r = 0; r < ROWS; r++) Arch::put(y + r * TILE, total[r]);
}

// The same in floats.
template <class Source, int BITS, int ROWS>
void exact_tile(const Weight& w, int64_t tile, const uint8_t* codes, const Activations& a, int64_t row, int64_t from,
                int64_t to, float* y) {
    for (int64_t first = from; first < to;) {
        const int64_t group = first / w.span;
        int64_t end = (group + 1) * w.span < to ? (group + 1) * w.span : to;
        end = end < first + 256 ? end : first + 256;  // sums of sums keep rounding errors small
        const Real zero = zeros_of(w, tile, group), scale = scales_of(w, tile, group);
        Real part[ROWS][2];
        UNROLL
        for (int r = 0; r < ROWS; r++) part[r][0] = part[r][1] = Arch::all(0.f);
        for (int64_t at = first; at < end; at += BLOCK) {
            const uint8_t* block = codes + (at - from) / BLOCK * Source::BYTES;
            UNROLL
            for (int step = 0; step < STEPS; step++) {
                const Codes four = Source::codes(block, step);
                UNROLL
                for (int byte = 0; byte < 4; byte++) {
                    const Real code = Arch::sub(Arch::code(four, byte), zero);
                    UNROLL
                    for (int r = 0; r < ROWS; r++) {
                        const float x = a.x[size_t((row + r) * w.positions + at + 4 * step + byte)];
                        part[r][byte % 2] = Arch::fma(code, Arch::all(x), part[r][byte % 2]);
                    }
                }
            }
        }
        UNROLL
        for (int r = 0; r < ROWS; r++)
            Arch::put(y + r * TILE, Arch::fma(Arch::add(part[r][0], part[r][1]), scale, Arch::get(y + r * TILE)));
        first = end;
    }
}

template <class Source, int BITS, Form FORM, int ROWS>
INLINE void tile_by_rows(const Weight& w, int64_t tile, const uint8_t* codes, const Activations& a, int64_t row, int64_t from,
                         int64_t to, float* y) {
    if constexpr (FORM == FLOATS) exact_tile<Source, BITS, ROWS>(w, tile, codes, a, row, from, to, y);
    else integer_tile<Source, BITS, FORM, ROWS>(w, tile, codes, a, row, from, to, y);
}

struct Bias {
    const void* values;  // or null
    int dtype;
};

void store(const float* y, int64_t tile, int64_t out, Bias bias, void* to, int64_t row, int dtype) {
    for (int64_t n = tile * TILE; n < out && n < (tile + 1) * TILE; n++) {
        const float value = y[n - tile * TILE] + (bias.values != nullptr ? element(bias.values, n, bias.dtype) : 0.f);
        if (dtype == F32) static_cast<float*>(to)[row * out + n] = value;
        else static_cast<uint16_t*>(to)[row * out + n] = dtype == F16 ? to_half(value) : to_bfloat(value);
    }
}

constexpr int64_t SLAB = 512;        // positions whose unpacked codes, 8 KiB a tile, stay in the first cache
constexpr int64_t ROWS_AT_ONCE = 128;  // rows whose digits of a slab stay in the second

// Tiles [first, last) by all rows.
template <int BITS, Form FORM>
void product(const Weight& w, const Activations& a, int64_t rows, Bias bias, int dtype, void* out, int64_t first,
             int64_t last) noexcept {  // its scratch of some 100 KB is the only thing that could fail
    using From = Packed<BITS>;
    const int64_t blocks = w.positions / BLOCK;
    if (rows == 1) {
        for (int64_t tile = first; tile < last; tile++) {
            float y[TILE] = {};
            tile_by_rows<From, BITS, FORM, 1>(w, tile, w.codes + tile * blocks * From::BYTES, a, 0, 0, w.positions, y);
            store(y, tile, w.out, bias, out, 0, dtype);
        }
        return;
    }
    constexpr int TOGETHER = FORM == BYTES || FORM == WORDS ? Arch::ROWS : Arch::ROWS / 2;
    // A slab ends where a run ends: at a multiple of 128 within groups that are longer, else with a group.
    const int64_t per_slab = w.span >= SLAB ? 0 : SLAB / w.span;
    std::vector<uint8_t> codes(size_t((SLAB + BLOCK) / BLOCK) * 64 * STEPS);
    std::vector<float> y(size_t((last - first) * ROWS_AT_ONCE * TILE));
    for (int64_t top = 0; top < rows; top += ROWS_AT_ONCE) {
        const int64_t count = rows - top < ROWS_AT_ONCE ? rows - top : ROWS_AT_ONCE;
        std::fill(y.begin(), y.end(), 0.f);
        for (int64_t from = 0, to; from < w.positions; from = to) {
            if (per_slab > 0) to = from + per_slab * w.span;
            else to = from + SLAB < (from / w.span + 1) * w.span ? from + SLAB : (from / w.span + 1) * w.span;
            to = to < w.positions ? to : w.positions;
            for (int64_t tile = first; tile < last; tile++) {
                const uint8_t* block = w.codes + (tile * blocks + from / BLOCK) * From::BYTES;
                uint8_t* unpacked = codes.data();
                for (int64_t b = from; b < to; b += BLOCK, block += From::BYTES, unpacked += 64 * STEPS)
                    UNROLL
                    for (int step = 0; step < STEPS; step++) Arch::store(unpacked + 64 * step, From::codes(block, step));
                float* sums = y.data() + (tile - first) * ROWS_AT_ONCE * TILE;
                int64_t row = 0;
                for (; row + TOGETHER <= count; row += TOGETHER)
                    tile_by_rows<Unpacked<BITS>, BITS, FORM, TOGETHER>(w, tile, codes.data(), a, top + row, from, to,
                                                                         sums + row * TILE);
                for (; row < count; row++)
                    tile_by_rows<Unpacked<BITS>, BITS, FORM, 1>(w, tile, codes.data(), a, top + row, from, to,
                                                                  sums + row * TILE);
            }
        }
        for (int64_t tile = first; tile < last; tile++)
            for (int64_t row = 0; row < count; row++)
                store(y.data() + ((tile - first) * ROWS_AT_ONCE + row) * TILE, tile, w.out, bias, out, top + row, dtype);
    }
}

using Product = void (*)(const Weight&, const Activations&, int64_t, Bias, int, void*, int64_t, int64_t) noexcept;

template <int BITS> constexpr Form A16_FORM = Arch::WORDS<BITS> ? WORDS : DIGITS;

template <int BITS> Product by_path(int path) {
    return path == EXACT ? product<BITS, FLOATS> : path == A16 ? product<BITS, A16_FORM<BITS>> : product<BITS, BYTES>;
}

Product product_of(int bits, int path) {
    constexpr Product (*by_bits[])(int) = {by_path<2>, by_path<3>, by_path<4>, by_path<5>, by_path<6>, by_path<7>, by_path<8>};
    return by_bits[bits - 2](path);
}

Form form_of(int bits, int path) {
    constexpr Form a16[] = {A16_FORM<2>, A16_FORM<3>, A16_FORM<4>, A16_FORM<5>, A16_FORM<6>, A16_FORM<7>, A16_FORM<8>};
    return path == EXACT ? FLOATS : path == A16 ? a16[bits - 2] : BYTES;
}

constexpr int64_t CHUNK_BYTES = 1 << 16;  // of codes: some 5 microseconds of one row
constexpr int64_t ROWS_PREPARED = 512;    // of x at a time, which bounds what is kept

void fill(const Weight& w, const void* x, int64_t rows, int64_t stride, int dtype, Form form, Activations& a) {
    const auto by_form = form == FLOATS   ? prepare<FLOATS>
                         : form == BYTES  ? prepare<BYTES>
                         : form == DIGITS ? prepare<DIGITS>
                                          : prepare<WORDS>;
    by_form(w, x, rows, stride, dtype, a);
}

// Kept: allocating it anew costs as much as a small product.
Activations& of_this_thread() {
    static thread_local Activations activations;
    return activations;
}

struct Shared {  // a product that threads share out by tiles
    const Weight* weight;
    const Activations* activations;
    Product product;
    int64_t rows;
    Bias bias;
    int dtype;
    void* out;
    int64_t tiles, chunk;

    static int work(void* context, int64_t, int64_t number) {
        const Shared& s = *static_cast<Shared*>(context);
        const int64_t first = number * s.chunk, last = std::min(first + s.chunk, s.tiles);
        s.product(*s.weight, *s.activations, s.rows, s.bias, s.dtype, s.out, first, last);
        return 0;
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------------ C ABI

extern "C" {

int nearplane_abi() { return 6; }

// Whether this machine can run an instruction set's library. Asked of the portable one.
int nearplane_runs(int isa) {
    if (isa == ISA_PORTABLE) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == ISA_AVX2) return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

// x [rows, in] with `stride` elements from row to row, y [rows, out] of the same dtype, bias [out] of its own or null.
// Returns 0; 1 where memory runs out. The arguments are checked by the caller (cpu.py).
int nearplane_linear(const NearplaneWeight* w, const void* x, int64_t rows, int64_t stride, int dtype, const void* bias,
                     int bias_dtype, void* y, int path, int threads) {
    const int64_t tiles = (w->out + TILE - 1) / TILE, bytes = w->positions / BLOCK * 64 * w->bits;
    const int64_t chunk = rows > 1 ? 4 : std::max<int64_t>(1, CHUNK_BYTES / bytes), size = dtype == F32 ? 4 : 2;
    const int64_t chunks = (tiles + chunk - 1) / chunk;
    for (int64_t top = 0; top < rows; top += ROWS_PREPARED) {
        const int64_t count = std::min(rows - top, ROWS_PREPARED);
        try {
            Activations& activations = of_this_thread();
            fill(*w, static_cast<const char*>(x) + top * stride * size, count, stride, dtype, form_of(w->bits, path), activations);
            void* out = static_cast<char*>(y) + top * w->out * size;
            Shared shared{w, &activations, product_of(w->bits, path), count, {bias, bias_dtype}, dtype, out, tiles, chunk};
            if (nearplane_steps(Shared::work, &shared, &chunks, 1, w->out * w->positions * count, threads)) return 1;
        } catch (const std::bad_alloc&) {
            return 1;
        }
    }
    return 0;
}

// The same for one row of float32 in two parts, for a thread that has its own share of a product's tiles of 16 outputs.
// The first part prepares x; the second takes what this thread prepared last, and writes outputs [16 first, 16 last).
int nearplane_prepare(const NearplaneWeight* w, const float* x, int path) {
    try {
        fill(*w, x, 1, w->in, F32, form_of(w->bits, path), of_this_thread());
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
void nearplane_tiles(const NearplaneWeight* w, int path, const void* bias, int bias_dtype, float* y, int64_t first, int64_t last) {
    product_of(w->bits, path)(*w, of_this_thread(), 1, {bias, bias_dtype}, F32, y, first, last);
}

// Whether two weights of as many inputs take the same prepared x.
int nearplane_alike(const NearplaneWeight* a, int path_a, const NearplaneWeight* b, int path_b) {
    return form_of(a->bits, path_a) == form_of(b->bits, path_b) && a->in == b->in && a->positions == b->positions &&
           a->groups == b->groups && a->span == b->span && a->order == b->order;
}

// Bytes of codes in a tile.
int64_t nearplane_tile_bytes(const NearplaneWeight* w) { return w->positions / BLOCK * 64 * w->bits; }

// Reads memory as the kernel reads codes; what a benchmark divides by.
uint64_t nearplane_read(const uint8_t* p, int64_t bytes) {
    Codes found[4] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 4; j++) found[j] = Arch::join(found[j], Arch::load(p + i + 64 * j));
    uint8_t last[64];
    Arch::store(last, Arch::join(Arch::join(found[0], found[1]), Arch::join(found[2], found[3])));
    uint64_t sum = 0;
    for (const uint8_t byte : last) sum += byte;
    return sum;
}
}
