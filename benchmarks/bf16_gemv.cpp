// A plain bfloat16 matrix by vector, what the packed kernel is also compared with: torch's own is no strong baseline.
// Rows one by one, 64 columns at a time, float32 sums; reads the weight once and does nothing else.
#include <cstdint>
#include <cstring>

extern "C" void gemv(const uint16_t* w, const float* x, float* y, int64_t out, int64_t in) {
    for (int64_t n = 0; n < out; n++) {
        const uint16_t* row = w + n * in;
        __builtin_prefetch(row + in);
        float sums[64] = {};
        for (int64_t k = 0; k + 64 <= in; k += 64) {
            __builtin_prefetch(row + k + 2048);
            __builtin_prefetch(row + k + 2080);
            for (int i = 0; i < 64; i++) {
                const uint32_t u = uint32_t(row[k + i]) << 16;
                float f;
                memcpy(&f, &u, 4);
                sums[i] += f * x[k + i];
            }
        }
        float total = 0;
        for (int i = 0; i < 64; i++) total += sums[i];
        for (int64_t k = in / 64 * 64; k < in; k++) {
            const uint32_t u = uint32_t(row[k]) << 16;
            float f;
            memcpy(&f, &u, 4);
            total += f * x[k];
        }
        y[n] = total;
    }
}
