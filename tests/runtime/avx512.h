// The AVX-512 instructions of kernel.cpp over plain arrays, so that its logic is tested on machines without them.
// Included before the kernel (g++ -include), which then leaves <immintrin.h> out. Semantics as Intel's guide gives them.
#include <cmath>
#include <cstdint>
#include <cstring>

struct __m128i { uint8_t b[16]; };
struct __m256i { uint8_t b[32]; };
struct __m512i { uint8_t b[64]; };
struct __m512 { float f[16]; };

template <class To, class From> static To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
struct Dwords { uint32_t v[16]; };
struct Words { uint16_t v[32]; };

static inline __m512i _mm512_loadu_si512(const void* p) { __m512i r; memcpy(r.b, p, 64); return r; }
static inline __m256i _mm256_loadu_si256(const __m256i* p) { __m256i r; memcpy(r.b, p, 32); return r; }
static inline __m128i _mm_loadu_si128(const __m128i* p) { __m128i r; memcpy(r.b, p, 16); return r; }
static inline void _mm512_storeu_si512(void* p, __m512i a) { memcpy(p, a.b, 64); }
static inline __m512i _mm512_setzero_si512() { return {}; }
static inline __m512i _mm512_set1_epi8(char c) { __m512i r; memset(r.b, c, 64); return r; }
static inline __m512i _mm512_set1_epi32(int x) {
    Dwords r;
    for (auto& v : r.v) v = uint32_t(x);
    return bits<__m512i>(r);
}
template <class F> static __m512i words(__m512i a, F f) {
    Words r = bits<Words>(a);
    for (auto& v : r.v) v = uint16_t(f(v));
    return bits<__m512i>(r);
}
template <class F> static __m512i dwords(__m512i a, F f) {
    Dwords r = bits<Dwords>(a);
    for (auto& v : r.v) v = uint32_t(f(v));
    return bits<__m512i>(r);
}
// Counts beyond the width give 0, as the hardware does.
static inline __m512i _mm512_slli_epi16(__m512i a, unsigned n) { return words(a, [=](uint16_t v) { return n > 15 ? 0 : v << n; }); }
static inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) { return words(a, [=](uint16_t v) { return n > 15 ? 0 : v >> n; }); }
static inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return dwords(a, [=](uint32_t v) { return n > 31 ? 0 : v << n; }); }
static inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return dwords(a, [=](uint32_t v) { return n > 31 ? 0 : v >> n; }); }
static inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) { return dwords(a, [=](uint32_t v) { return int32_t(v) >> (n > 31 ? 31 : n); }); }
static inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i r = {};
    for (int i = 0; i < 512; i++) {
        const auto bit = [i](const __m512i& v) { return v.b[i / 8] >> i % 8 & 1; };
        r.b[i / 8] |= uint8_t((table >> (bit(a) << 2 | bit(b) << 1 | bit(c)) & 1) << i % 8);
    }
    return r;
}
static inline __m512i _mm512_and_si512(__m512i a, __m512i b) { for (int i = 0; i < 64; i++) a.b[i] &= b.b[i]; return a; }
static inline __m512i _mm512_or_si512(__m512i a, __m512i b) { for (int i = 0; i < 64; i++) a.b[i] |= b.b[i]; return a; }
static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    Dwords x = bits<Dwords>(a), y = bits<Dwords>(b);
    for (int i = 0; i < 16; i++) x.v[i] += y.v[i];
    return bits<__m512i>(x);
}
static inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {  // unsigned a, signed b
    Dwords x = bits<Dwords>(sum);
    for (int i = 0; i < 64; i++) x.v[i / 4] += uint32_t(int32_t(a.b[i]) * int32_t(int8_t(b.b[i])));
    return bits<__m512i>(x);
}
static inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    Dwords x = bits<Dwords>(a);
    __m512 r;
    for (int i = 0; i < 16; i++) r.f[i] = float(int32_t(x.v[i]));
    return r;
}
static inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    Dwords r;
    for (int i = 0; i < 16; i++) r.v[i] = a.b[i];
    return bits<__m512i>(r);
}
static inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    Dwords r;
    for (int i = 0; i < 16; i++) r.v[i] = uint32_t(a.b[2 * i] | a.b[2 * i + 1] << 8);
    return bits<__m512i>(r);
}
static inline __m512 _mm512_castsi512_ps(__m512i a) { return bits<__m512>(a); }
static inline __m512 _mm512_cvtph_ps(__m256i a) {
    __m512 r;
    for (int i = 0; i < 16; i++) {
        const int h = a.b[2 * i] | a.b[2 * i + 1] << 8, exponent = h >> 10 & 31, fraction = h & 1023;
        const double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
        r.f[i] = float(h & 0x8000 ? -value : value);
    }
    return r;
}
static inline __m512 _mm512_set1_ps(float x) { __m512 r; for (auto& f : r.f) f = x; return r; }
static inline __m512 _mm512_loadu_ps(const void* p) { __m512 r; memcpy(r.f, p, 64); return r; }
static inline void _mm512_storeu_ps(void* p, __m512 a) { memcpy(p, a.f, 64); }
static inline __m512 _mm512_add_ps(__m512 a, __m512 b) { for (int i = 0; i < 16; i++) a.f[i] += b.f[i]; return a; }
static inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { for (int i = 0; i < 16; i++) a.f[i] -= b.f[i]; return a; }
static inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { for (int i = 0; i < 16; i++) a.f[i] *= b.f[i]; return a; }
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; i++) a.f[i] = std::fma(a.f[i], b.f[i], c.f[i]);
    return a;
}
