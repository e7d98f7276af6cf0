// ggml's matrix product, the one that llama.cpp decodes with, for packed.py (ggml.py compiles and calls it).
// One graph multiplies the same x with every copy of one weight, so that ggml pays for starting a graph only once a round.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

struct Bench {
    ggml_backend_t backend = nullptr;
    ggml_threadpool_t pool = nullptr;
    ggml_context *weights = nullptr, *work = nullptr;
    ggml_backend_buffer_t weight_memory = nullptr, work_memory = nullptr;
    ggml_cgraph* graph = nullptr;
    ggml_tensor* last = nullptr;
};

ggml_context* context(int64_t tensors) {
    const size_t size = size_t(tensors) * ggml_tensor_overhead() + ggml_graph_overhead_custom(size_t(tensors), false);
    return ggml_init({size, nullptr, true});
}

// The buffers in which llama.cpp keeps weights in the order that its kernels like; null where there are none.
ggml_backend_buffer_type_t repacking() {
    ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts"));
    if (extra == nullptr) return nullptr;
    for (ggml_backend_buffer_type_t* type = extra(ggml_backend_reg_dev_get(reg, 0)); type != nullptr && *type != nullptr; type++)
        if (strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) return *type;
    return nullptr;
}

}  // namespace

extern "C" {

const char* bench_version() {
    ggml_log_set([](ggml_log_level level, const char* text, void*) { if (level >= GGML_LOG_LEVEL_WARN) fputs(text, stderr); }, nullptr);
    return ggml_version();
}

void bench_free(Bench* b) {
    if (b->pool != nullptr) ggml_threadpool_free(b->pool);
    ggml_backend_buffer_free(b->weight_memory);
    ggml_backend_buffer_free(b->work_memory);
    ggml_free(b->weights);
    ggml_free(b->work);
    ggml_backend_free(b->backend);
    delete b;
}

// w [out, in], x [rows, in]; `repack`: llama.cpp's own order of the codes, where the type has one. Null: there is no such type, or order.
Bench* bench_new(const char* type_name, const float* w, const float* x, int64_t out, int64_t in, int64_t rows, int copies,
                 int threads, int repack) {
    ggml_type type = GGML_TYPE_COUNT;
    for (int t = 0; t < GGML_TYPE_COUNT; t++)
        if (ggml_type_name(ggml_type(t)) != nullptr && strcmp(ggml_type_name(ggml_type(t)), type_name) == 0) type = ggml_type(t);
    ggml_backend_buffer_type_t where = repack ? repacking() : ggml_backend_cpu_buffer_type();
    if (type == GGML_TYPE_COUNT || where == nullptr || in % ggml_blck_size(type) != 0) return nullptr;

    auto* b = new Bench;
    b->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(b->backend, threads);
    if (threads > 1) {
        ggml_threadpool_params params = ggml_threadpool_params_default(threads);
        b->pool = ggml_threadpool_new(&params);
        ggml_backend_cpu_set_threadpool(b->backend, b->pool);
    }
    b->weights = context(copies);
    std::vector<ggml_tensor*> weights;
    for (int i = 0; i < copies; i++) weights.push_back(ggml_new_tensor_2d(b->weights, type, in, out));
    b->weight_memory = ggml_backend_alloc_ctx_tensors_from_buft(b->weights, where);
    if (repack && weights[0]->extra == nullptr) {
        bench_free(b);
        return nullptr;
    }
    std::vector<char> codes(size_t(out) * ggml_row_size(type, in));
    ggml_quantize_chunk(type, w, codes.data(), 0, out, in, nullptr);
    for (ggml_tensor* weight : weights) ggml_backend_tensor_set(weight, codes.data(), 0, codes.size());

    b->work = context(2 * copies + 8);
    ggml_tensor* input = ggml_new_tensor_2d(b->work, GGML_TYPE_F32, in, rows);
    b->graph = ggml_new_graph_custom(b->work, size_t(2 * copies + 8), false);
    for (ggml_tensor* weight : weights) {
        b->last = ggml_mul_mat(b->work, weight, input);
        ggml_build_forward_expand(b->graph, b->last);
    }
    b->work_memory = ggml_backend_alloc_ctx_tensors(b->work, b->backend);
    ggml_backend_tensor_set(input, x, 0, size_t(rows * in) * sizeof(float));
    return b;
}

// 0: done.
int bench_run(Bench* b) { return ggml_backend_graph_compute(b->backend, b->graph); }

void bench_output(const Bench* b, float* y) { ggml_backend_tensor_get(b->last, y, 0, ggml_nbytes(b->last)); }

int64_t bench_bytes(const char* type_name, int64_t out, int64_t in) {
    for (int t = 0; t < GGML_TYPE_COUNT; t++)
        if (ggml_type_name(ggml_type(t)) != nullptr && strcmp(ggml_type_name(ggml_type(t)), type_name) == 0)
            return out * int64_t(ggml_row_size(ggml_type(t), in));
    return 0;
}
}
