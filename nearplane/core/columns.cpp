// Columns one after the other: complete a column by what the columns before it passed on, round it, pass on its error. A C ABI.
//
// core/sweep.py and core/refine.py say what is computed, and do it with torch where this is not compiled. A row of the weight
// (an output) depends on no other, so that each thread takes some. Arrays are (columns, out) with outputs contiguous: a lane of
// a vector is one output. What a run of outputs passed on stays in the cache of its core.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifndef NEARPLANE_ISA
#define NEARPLANE_ISA 0
#endif
#define INLINE inline __attribute__((always_inline))

extern "C" {
int nearplane_steps(int (*work)(void*, int64_t, int64_t), void* context, const int64_t* chunks, int64_t steps, int64_t products,
                    int threads);

// Arrays of (columns, out), and `feedback` (columns, columns), of which only what lies above the diagonal is read.
struct NearplaneColumns {
    void* value;           // in: complete but for what these columns pass on; out: complete, of a descent rounded
    void* steps;           // of a sweep, out: the rounded steps; of a descent, in: the steps of before
    void* passed;          // of a sweep, in: the targets; out: what each column passes on
    const void* scale;     // of a sweep: a value is so many times its step
    const void* low;       // the least and the greatest step; of a descent one of each output, (out)
    const void* high;
    const void* feedback;  // the share of what column i passed on that reaches column j
    int64_t columns, out;
    int32_t doubles;       // float64, else float32
    int32_t shifted;       // steps are whole numbers above `low`, else whole numbers
    int32_t descent;       // else a sweep
};
}

namespace {

#if defined(NEARPLANE_EMULATED) || NEARPLANE_ISA == 0
constexpr int BYTES = 16;  // of a vector
#else
constexpr int BYTES = NEARPLANE_ISA == 2 ? 64 : 32;
#endif
constexpr int PARTS = 2;     // vectors of a column that are worked on at a time: a run of outputs
constexpr int AHEAD = 8;     // columns that are asked for before their turn
constexpr int TOGETHER = 4;  // columns that are completed by one reading of what came before

template <class T> struct Lanes {  // a run's part of one column
    static constexpr int EACH = BYTES / sizeof(T), COUNT = PARTS * EACH;
    typedef T Vector __attribute__((vector_size(BYTES)));
    Vector part[PARTS];

    INLINE void add(const Lanes& passed, T share) {
        for (int p = 0; p < PARTS; p++) part[p] += passed.part[p] * share;
    }
};

#if defined(__x86_64__) && NEARPLANE_ISA == 0  // there rounding would be a call of the library
template <class T> INLINE T whole_by(T x, T large) {  // from `large` on all numbers are whole
    const T size = x < 0 ? -x : x, rounded = (size + large) - large;
    return size < large ? (x < 0 ? -rounded : rounded) : x;
}
INLINE float whole(float x) { return whole_by(x, 0x1p23f); }
INLINE double whole(double x) { return whole_by(x, 0x1p52); }
#else
INLINE float whole(float x) { return __builtin_nearbyintf(x); }
INLINE double whole(double x) { return __builtin_nearbyint(x); }
#endif

template <class T, bool FULL> struct Run {
    using L = Lanes<T>;
    const NearplaneColumns& c;
    const int64_t first;
    const int lanes;

    const T* at(const void* array, int64_t column) const { return static_cast<const T*>(array) + column * c.out + first; }
    T* at(void* array, int64_t column) const { return static_cast<T*>(array) + column * c.out + first; }

    INLINE L load(const T* from) const {
        L v;
        if (FULL) {
            memcpy(&v, from, sizeof v);
        } else {
            T some[L::COUNT];
            for (int l = 0; l < L::COUNT; l++) some[l] = from[l < lanes ? l : 0];
            memcpy(&v, some, sizeof v);
        }
        return v;
    }
    INLINE void store(T* to, const L& v) const { memcpy(to, &v, FULL ? sizeof v : size_t(lanes) * sizeof(T)); }

    // Columns lie far apart: the processor does not see by itself what is read next.
    INLINE void ask(int64_t column) const {
        if (column >= c.columns) return;
        for (int64_t byte = 0; byte < int64_t(sizeof(L)); byte += 64) {
            const void* const arrays[] = {c.value, c.passed, c.steps, c.scale, c.low, c.high};
            for (const void* array : arrays)
                if (array != nullptr) __builtin_prefetch(reinterpret_cast<const char*>(at(array, column)) + byte);
        }
    }
    // Rounds a complete column, and returns what it passes on.
    template <bool DESCENT, bool SHIFTED> INLINE L settled(int64_t column, const L& sum) const {
        const int64_t group = DESCENT ? 0 : column;
        const L lows = load(at(c.low, group)), highs = load(at(c.high, group)), before = load(at(DESCENT ? c.steps : c.passed, column));
        L scales = sum, steps, passed;
        if (!DESCENT) scales = load(at(c.scale, column));
        alignas(64) T v[L::COUNT], low[L::COUNT], high[L::COUNT], from[L::COUNT], scale[L::COUNT], step[L::COUNT], pass[L::COUNT];
        memcpy(v, &sum, sizeof sum), memcpy(low, &lows, sizeof sum), memcpy(high, &highs, sizeof sum);
        memcpy(from, &before, sizeof sum), memcpy(scale, &scales, sizeof sum);
        for (int l = 0; l < L::COUNT; l++) {
            T x = DESCENT ? v[l] : v[l] / scale[l];  // a value that is no number stays none: the certificate finds it
            const T least = SHIFTED ? T(0) : low[l], most = SHIFTED ? high[l] - low[l] : high[l];
            x = whole(SHIFTED ? x - low[l] : x);
            x = x < least ? least : x;
            x = x > most ? most : x;
            step[l] = SHIFTED ? x + low[l] : x;
            pass[l] = DESCENT ? from[l] - step[l] : from[l] - step[l] * scale[l];
        }
        memcpy(&steps, step, sizeof steps), memcpy(&passed, pass, sizeof passed);
        store(at(c.value, column), DESCENT ? steps : sum);
        if (!DESCENT) store(at(c.steps, column), steps);
        store(at(c.passed, column), passed);
        return passed;
    }

    template <bool DESCENT, bool SHIFTED> void all(L* passed) const {
        const T* feedback = static_cast<const T*>(c.feedback);
        int64_t a = 0;
        for (; a + TOGETHER <= c.columns; a += TOGETHER) {
            L s0 = load(at(c.value, a)), s1 = load(at(c.value, a + 1)), s2 = load(at(c.value, a + 2)), s3 = load(at(c.value, a + 3));
            for (int k = 0; k < TOGETHER; k++) ask(a + AHEAD + k);
            const T* row = feedback + a;
            for (int64_t i = 0; i < a; i++, row += c.columns) {
                const L e = passed[i];
                s0.add(e, row[0]), s1.add(e, row[1]), s2.add(e, row[2]), s3.add(e, row[3]);
            }
            const L e0 = passed[a] = settled<DESCENT, SHIFTED>(a, s0);
            s1.add(e0, row[1]), s2.add(e0, row[2]), s3.add(e0, row[3]);
            row += c.columns;
            const L e1 = passed[a + 1] = settled<DESCENT, SHIFTED>(a + 1, s1);
            s2.add(e1, row[2]), s3.add(e1, row[3]);
            row += c.columns;
            const L e2 = passed[a + 2] = settled<DESCENT, SHIFTED>(a + 2, s2);
            s3.add(e2, row[3]);
            passed[a + 3] = settled<DESCENT, SHIFTED>(a + 3, s3);
        }
        for (; a < c.columns; a++) {
            L s = load(at(c.value, a));
            for (int64_t i = 0; i < a; i++) s.add(passed[i], feedback[i * c.columns + a]);
            passed[a] = settled<DESCENT, SHIFTED>(a, s);
        }
    }
};

constexpr int64_t MOST_COLUMNS = 256;

template <class T, bool FULL> void round_run(const Run<T, FULL>& run) {
    Lanes<T> passed[MOST_COLUMNS];
    if (run.c.descent)
        run.c.shifted ? run.template all<true, true>(passed) : run.template all<true, false>(passed);
    else
        run.c.shifted ? run.template all<false, true>(passed) : run.template all<false, false>(passed);
}

template <class T> int run_chunk(void* context, int64_t, int64_t chunk) {
    const NearplaneColumns& c = *static_cast<const NearplaneColumns*>(context);
    const int64_t first = chunk * Lanes<T>::COUNT, left = c.out - first;
    if (left >= Lanes<T>::COUNT)
        round_run(Run<T, true>{c, first, Lanes<T>::COUNT});
    else
        round_run(Run<T, false>{c, first, int(left)});
    return 0;
}

struct Errors {  // of rounding rows of weights to nearest, each row on a scale and a zero of its own
    const void *rows, *importance, *scale, *zero;
    void* error;
    int64_t count, width;
    double least, greatest;  // codes
    bool shifted;
};
constexpr int64_t ROWS = 64;  // of a chunk

template <class T, bool SHIFTED> INLINE T weighted(const T* x, const T* importance, T scale, T zero, T least, T greatest, int64_t n) {
    const auto error = [&](T w, T share) {
        T code = SHIFTED ? whole(w / scale + zero) : whole(w / scale) + zero;
        code = code < least ? least : code;
        code = code > greatest ? greatest : code;
        const T missed = (code - zero) * scale - w;
        return missed * missed * share;
    };
    constexpr int EACH = 64 / sizeof(T);
    T sums[EACH] = {}, sum = 0;
    int64_t i = 0;
    for (; i + EACH <= n; i += EACH)
        for (int l = 0; l < EACH; l++) sums[l] += error(x[i + l], importance[i + l]);
    for (; i < n; i++) sum += error(x[i], importance[i]);
    for (int l = 0; l < EACH; l++) sum += sums[l];
    return sum;
}

template <class T> int errors_chunk(void* context, int64_t, int64_t chunk) {
    const Errors& e = *static_cast<const Errors*>(context);
    const T *x = static_cast<const T*>(e.rows), *importance = static_cast<const T*>(e.importance);
    const T *scale = static_cast<const T*>(e.scale), *zero = static_cast<const T*>(e.zero);
    const T least = T(e.least), greatest = T(e.greatest);
    for (int64_t r = chunk * ROWS; r < std::min(e.count, (chunk + 1) * ROWS); r++) {
        const T *mine = x + r * e.width, *shares = importance + r * e.width;
        static_cast<T*>(e.error)[r] = e.shifted ? weighted<T, true>(mine, shares, scale[r], zero[r], least, greatest, e.width)
                                                : weighted<T, false>(mine, shares, scale[r], zero[r], least, greatest, e.width);
    }
    return 0;
}

}  // namespace

extern "C" {

// error[r] = sum over a row of importance ((code - zero) scale - weight)^2, where codes from least to greatest are the nearest.
int nearplane_errors(const void* rows, const void* importance, const void* scale, const void* zero, void* error, int64_t count,
                     int64_t width, double least, double greatest, int doubles, int shifted, int threads) {
    Errors e{rows, importance, scale, zero, error, count, width, least, greatest, shifted != 0};
    const int64_t chunks = (count + ROWS - 1) / ROWS;
    return nearplane_steps(doubles ? errors_chunk<double> : errors_chunk<float>, &e, &chunks, 1, 8 * count * width, threads);
}

// Rounds at most 256 columns, by so many threads. Returns 0, or 2 for more columns.
int nearplane_columns(const NearplaneColumns* columns, int threads) {
    if (columns->columns > MOST_COLUMNS) return 2;
    NearplaneColumns c = *columns;
    const int64_t lanes = c.doubles ? Lanes<double>::COUNT : Lanes<float>::COUNT;
    const int64_t chunks = (c.out + lanes - 1) / lanes;
    const int64_t products = c.columns * (c.columns + 16) / 2 * c.out;
    return nearplane_steps(c.doubles ? run_chunk<double> : run_chunk<float>, &c, &chunks, 1, products, threads);
}
}
