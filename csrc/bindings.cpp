// The module lares_fast._C: the only file that knows Python. Pointers arrive as integers; lares_fast/_native.py
// allocates, checks dtypes, devices and shapes, and is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"
#include "cuda/capability.h"
#include "cuda/plan.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "random/philox.h"
#include "recurrence/recurrence.h"
#include "simd/level.h"
#include "target_rank/target_rank.h"
#include "target_rank/target_rank_cuda.h"
#include "topk/topk.h"
#include "topk/topk_cuda.h"

namespace py = pybind11;

namespace {

using lares_fast::Key;
using lares_fast::MaskAddress;
using std::int64_t;
using std::uintptr_t;

// Raised whenever a function's arguments change; lares_fast/_native.py refuses a module with another number.
constexpr int ABI = 10;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

py::dict build_info() {
    namespace build = lares_fast::build;
    py::list archs;
    std::string arch;
    for (const char letter : std::string(build::CUDA_ARCHS) + ";") {
        if (letter != ';') {
            arch += letter;
        } else if (!arch.empty()) {
            archs.append(arch);
            arch.clear();
        }
    }
    py::dict info;
    info["version"] = build::VERSION;
    info["compiler"] = build::COMPILER;
    info["flags"] = build::FLAGS;
    info["build_type"] = build::TYPE;
    info["cpu_arch"] = build::CPU_ARCH;
    info["cuda_built"] = build::CUDA_BUILT;
    info["cuda_archs"] = archs;
    info["nvcc_version"] = build::NVCC_VERSION;
    info["cuda_reason"] = build::CUDA_REASON;
    return info;
}

// Addresses of centre, scale, panels, codes, start and bounds; of none without an index.
using Tables = std::vector<uintptr_t>;

lares_fast::IndexTables tables(const Tables& addresses) {
    if (addresses.empty()) return {};
    return {pointer<float>(addresses.at(0)),       pointer<float>(addresses.at(1)), pointer<float>(addresses.at(2)),
            pointer<std::int8_t>(addresses.at(3)), pointer<void>(addresses.at(4)),  pointer<float>(addresses.at(5))};
}

py::tuple index_shape(int64_t N, int64_t D) {
    const lares_fast::IndexShape shape = lares_fast::index_shape(N, D);
    return py::make_tuple(shape.panel, shape.panels, shape.coded_panel, shape.coded_panels, shape.code_bytes, shape.lane_bytes);
}

void build_index(uintptr_t items, int64_t N, int64_t D, const Tables& index, int64_t threads) {
    lares_fast::build_index(pointer<float>(items), N, D, tables(index), threads);
}

void topk(uintptr_t query, uintptr_t items, uintptr_t bias, uintptr_t exclude_offsets, uintptr_t exclude_ids, uintptr_t scores,
          uintptr_t ids, const Tables& index, int64_t B, int64_t N, int64_t D, int64_t k, int64_t threads) {
    lares_fast::topk_cpu({pointer<float>(query), pointer<float>(items), pointer<float>(bias), pointer<int64_t>(exclude_offsets),
                          pointer<int64_t>(exclude_ids), pointer<float>(scores), pointer<int64_t>(ids), B, N, D, k, tables(index)},
                         threads);
}

void target_rank(uintptr_t query, uintptr_t items, uintptr_t bias, uintptr_t target, uintptr_t exclude_offsets, uintptr_t exclude_ids,
                 uintptr_t rank, uintptr_t rank_of_all, int64_t B, int64_t N, int64_t D, bool ties_by_id, int64_t threads) {
    lares_fast::target_rank_cpu({pointer<float>(query), pointer<float>(items), pointer<float>(bias), pointer<int64_t>(target),
                                 pointer<int64_t>(exclude_offsets), pointer<int64_t>(exclude_ids), pointer<int64_t>(rank),
                                 pointer<int64_t>(rank_of_all), B, N, D, ties_by_id},
                                threads);
}

std::vector<float*> pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<float*> result;
    for (const uintptr_t address : addresses) result.push_back(pointer<float>(address));
    return result;
}

// The keyword arguments of one call. Each is taken once, by its name; end() raises if one is left.
class Arguments {
public:
    explicit Arguments(const py::kwargs& given) : given_(given), left_(given.size()) {}

    template <class T>
    T take(const char* name) {
        PyObject* const value = PyDict_GetItemString(given_.ptr(), name);
        if (!value) throw py::type_error(std::string(name) + " is missing");
        --left_;
        try {
            return py::handle(value).cast<T>();
        } catch (const py::cast_error&) {
            throw py::type_error(std::string(name) + " has a wrong type or is out of range");
        }
    }

    // The tensor at the address `name`; 0 is no tensor.
    template <class T>
    T* tensor(const char* name) {
        return pointer<T>(take<uintptr_t>(name));
    }

    // The value that the string `name` stands for.
    template <class T>
    T one_of(const char* name, std::initializer_list<std::pair<const char*, T>> values) {
        const auto given = take<std::string>(name);
        for (const auto& [word, value] : values) {
            if (given == word) return value;
        }
        throw std::invalid_argument(std::string(name) + " has an unknown value");
    }

    void end() const {
        if (left_) throw py::type_error("there is an argument that it does not take");
    }

private:
    const py::kwargs& given_;
    std::size_t left_;
};

// The arguments that both directions have. The result points to `weights`.
lares_fast::Recurrence recurrence(Arguments& arguments, std::vector<float*>& weights) {
    using lares_fast::Adapter;
    using lares_fast::Output;
    lares_fast::Recurrence call{};
    call.shape.D = arguments.take<int64_t>("width");
    call.shape.H = arguments.take<int64_t>("n_heads");
    call.shape.I = arguments.take<int64_t>("inner_size");
    call.shape.layers = arguments.take<int64_t>("n_layers");
    call.shape.adapter = arguments.one_of<Adapter>(
        "adapter", {{"none", Adapter::none}, {"add", Adapter::add}, {"linear", Adapter::linear}, {"concat", Adapter::concat}});
    call.output = arguments.one_of<Output>("output", {{"last", Output::last}, {"steps", Output::steps}, {"tokens", Output::tokens}});
    call.eps = arguments.take<float>("eps");
    const auto key = arguments.take<std::array<std::uint32_t, 2>>("key");
    call.dropout.key = {key[0], key[1]};
    call.dropout.hidden = arguments.take<std::uint32_t>("hidden_threshold");
    call.dropout.attention = arguments.take<std::uint32_t>("attention_threshold");
    call.dropout.first_step = arguments.take<std::uint32_t>("first_step");
    call.h = arguments.tensor<float>("h");
    call.pre = arguments.tensor<float>("pre");
    call.offsets = arguments.tensor<int64_t>("offsets");
    call.depth = arguments.tensor<int64_t>("depth");
    call.rows = arguments.tensor<int64_t>("rows");
    call.B = arguments.take<int64_t>("batch");
    weights = pointers(arguments.take<std::vector<uintptr_t>>("weights"));
    if (lares_fast::weight_count(call.shape) != static_cast<int64_t>(weights.size())) throw std::invalid_argument("the number of weights is wrong");
    call.weights = weights.data();
    call.tape = arguments.tensor<float>("tape");
    call.bf16 = arguments.take<bool>("bf16");
    return call;
}

void recurrence_forward(const py::kwargs& given) {
    Arguments arguments(given);
    std::vector<float*> weights;
    const lares_fast::Recurrence call = recurrence(arguments, weights);
    float* const out = arguments.tensor<float>("out");
    const auto threads = arguments.take<int64_t>("threads");
    arguments.end();
    const py::gil_scoped_release release;
    lares_fast::recurrence_forward(call, out, threads);
}

void recurrence_backward(const py::kwargs& given) {
    Arguments arguments(given);
    std::vector<float*> weights;
    const lares_fast::Recurrence call = recurrence(arguments, weights);
    const float* const out_grad = arguments.tensor<float>("out_grad");
    float* const h_grad = arguments.tensor<float>("h_grad");
    float* const pre_grad = arguments.tensor<float>("pre_grad");
    const std::vector<float*> weight_grads = pointers(arguments.take<std::vector<uintptr_t>>("weight_grads"));
    if (weight_grads.size() != weights.size()) throw std::invalid_argument("the number of weight_grads is wrong");
    const auto threads = arguments.take<int64_t>("threads");
    arguments.end();
    const py::gil_scoped_release release;
    lares_fast::recurrence_backward(call, out_grad, h_grad, pre_grad, weight_grads.data(), threads);
}

// Multiprocessors, shared memory a block, shared memory a multiprocessor.
using DeviceLimits = std::array<int64_t, 3>;

lares_fast::Limits limits_of(const DeviceLimits& limits) { return {limits[0], limits[1], limits[2]}; }

DeviceLimits device_limits(int device) {
    const lares_fast::Limits limits = lares_fast::device_limits(device);
    return {limits.multiprocessors, limits.shared_a_block, limits.shared_a_multiprocessor};
}

py::dict walk_plan(const lares_fast::WalkPlan& walk) {
    using py::literals::operator""_a;
    return py::dict("query_tiles"_a = walk.query_tiles, "splits"_a = walk.splits, "item_tiles"_a = walk.item_tiles,
                    "chunks"_a = walk.chunks, "resident"_a = walk.resident, "shared_bytes"_a = walk.shared_bytes);
}

py::dict plan_topk(int64_t B, int64_t N, int64_t D, int64_t k, const DeviceLimits& limits) {
    const lares_fast::TopkPlan plan = lares_fast::plan_topk(B, N, D, k, limits_of(limits));
    py::dict all = walk_plan(plan.walk);
    all["stride"] = plan.stride;
    all["step"] = plan.step;
    all["sorted"] = plan.sorted;
    all["merge_warps"] = plan.merge_warps;
    all["workspace_bytes"] = plan.workspace_bytes;
    return all;
}

py::dict plan_target_rank(int64_t B, int64_t N, int64_t D, const DeviceLimits& limits) {
    return walk_plan(lares_fast::plan_target_rank(B, N, D, limits_of(limits)));
}

std::string topk_cuda(uintptr_t query, uintptr_t items, uintptr_t bias, uintptr_t exclude_offsets, uintptr_t exclude_ids, uintptr_t scores,
                      uintptr_t ids, uintptr_t workspace, int64_t B, int64_t N, int64_t D, int64_t k, int64_t E, bool plain,
                      const DeviceLimits& limits, int device, uintptr_t stream) {
    return lares_fast::topk_cuda({pointer<float>(query), pointer<float>(items), pointer<float>(bias), pointer<int64_t>(exclude_offsets),
                                  pointer<int64_t>(exclude_ids), pointer<float>(scores), pointer<int64_t>(ids),
                                  pointer<void>(workspace), B, N, D, k, E, plain},
                                 limits_of(limits), device, stream);
}

std::string target_rank_cuda(uintptr_t query, uintptr_t items, uintptr_t bias, uintptr_t target, uintptr_t exclude_offsets,
                             uintptr_t exclude_ids, uintptr_t of_all, uintptr_t of_kept, int64_t B, int64_t N, int64_t D, int64_t E,
                             bool ties_by_id, bool plain, const DeviceLimits& limits, int device, uintptr_t stream) {
    return lares_fast::target_rank_cuda({pointer<float>(query), pointer<float>(items), pointer<float>(bias), pointer<int64_t>(target),
                                         pointer<int64_t>(exclude_offsets), pointer<int64_t>(exclude_ids), pointer<int64_t>(of_all),
                                         pointer<int64_t>(of_kept), B, N, D, E, ties_by_id, plain},
                                        limits_of(limits), device, stream);
}

void target_logprob(uintptr_t hidden, uintptr_t items, uintptr_t target, uintptr_t logprob, uintptr_t lse, uintptr_t rank, int64_t M,
                    int64_t N, int64_t D, double scale, bool skip_pad, bool ties_by_id, int64_t threads) {
    lares_fast::target_logprob_cpu({{pointer<float>(hidden), pointer<float>(items), pointer<int64_t>(target), M, N, D, scale, skip_pad},
                                    pointer<float>(logprob), pointer<double>(lse), pointer<int64_t>(rank), ties_by_id},
                                   threads);
}

void target_logprob_backward(uintptr_t hidden, uintptr_t items, uintptr_t target, uintptr_t grad, uintptr_t lse, uintptr_t d_hidden,
                             uintptr_t d_items, int64_t M, int64_t N, int64_t D, double scale, bool skip_pad, int64_t threads) {
    lares_fast::target_logprob_backward_cpu(
        {{pointer<float>(hidden), pointer<float>(items), pointer<int64_t>(target), M, N, D, scale, skip_pad},
         pointer<float>(grad), pointer<double>(lse), pointer<float>(d_hidden), pointer<float>(d_items)},
        threads);
}

void keep_hidden(std::uint32_t key0, std::uint32_t key1, int64_t threshold, int64_t site, int64_t step, int64_t layer, uintptr_t rows,
                 uintptr_t positions, int64_t P, int64_t D, uintptr_t out) {
    const MaskAddress address{Key{key0, key1}, threshold, step, layer, pointer<int64_t>(rows)};
    lares_fast::keep_hidden(address, pointer<int64_t>(positions), site, P, D, pointer<std::uint8_t>(out));
}

void state_uniforms(std::uint32_t key0, std::uint32_t key1, uintptr_t rows, uintptr_t positions, int64_t P, int64_t D, uintptr_t out) {
    lares_fast::state_uniforms(Key{key0, key1}, pointer<int64_t>(rows), pointer<int64_t>(positions), P, D, pointer<double>(out));
}

void keep_attention(std::uint32_t key0, std::uint32_t key1, int64_t threshold, int64_t step, int64_t layer, uintptr_t rows, int64_t B,
                    int64_t H, int64_t L, uintptr_t out) {
    const MaskAddress address{Key{key0, key1}, threshold, step, layer, pointer<int64_t>(rows)};
    lares_fast::keep_attention(address, B, H, L, pointer<std::uint8_t>(out));
}

py::tuple philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t key0, std::uint32_t key1) {
    const std::uint32_t counter[1] = {c0};
    std::uint32_t words[4][1];
    lares_fast::philox(counter, c1, c2, c3, Key{key0, key1}, words);
    return py::make_tuple(words[0][0], words[1][0], words[2][0], words[3][0]);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using py::arg;
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("ABI") = ABI;
    m.def("build_info", &build_info);
    m.def("use_level", &lares_fast::use_level, arg("name"));
    m.def("level", &lares_fast::level_name);
    m.def("has_bf16", &lares_fast::has_bf16);
    m.def("capability", &lares_fast::capability, arg("device"), Release());
    m.def("device_limits", &device_limits, arg("device"), Release());
    m.def("plan_topk", &plan_topk, arg("B"), arg("N"), arg("D"), arg("k"), arg("limits"));
    m.def("plan_target_rank", &plan_target_rank, arg("B"), arg("N"), arg("D"), arg("limits"));
    m.def("topk_cuda", &topk_cuda, arg("query"), arg("items"), arg("bias"), arg("exclude_offsets"), arg("exclude_ids"), arg("scores"),
          arg("ids"), arg("workspace"), arg("B"), arg("N"), arg("D"), arg("k"), arg("E"), arg("plain"), arg("limits"), arg("device"), arg("stream"),
          Release());
    m.def("target_rank_cuda", &target_rank_cuda, arg("query"), arg("items"), arg("bias"), arg("target"), arg("exclude_offsets"),
          arg("exclude_ids"), arg("of_all"), arg("of_kept"), arg("B"), arg("N"), arg("D"), arg("E"), arg("ties_by_id"), arg("plain"), arg("limits"),
          arg("device"), arg("stream"), Release());
    m.def("topk", &topk, arg("query"), arg("items"), arg("bias"), arg("exclude_offsets"), arg("exclude_ids"), arg("scores"), arg("ids"),
          arg("index"), arg("B"), arg("N"), arg("D"), arg("k"), arg("threads"), Release());
    m.def("index_shape", &index_shape, arg("N"), arg("D"));
    m.def("build_index", &build_index, arg("items"), arg("N"), arg("D"), arg("index"), arg("threads"), Release());
    m.def("target_rank", &target_rank, arg("query"), arg("items"), arg("bias"), arg("target"), arg("exclude_offsets"), arg("exclude_ids"),
          arg("rank"), arg("rank_of_all"), arg("B"), arg("N"), arg("D"), arg("ties_by_id"), arg("threads"), Release());
    m.def("recurrence_forward", &recurrence_forward);
    m.def("recurrence_backward", &recurrence_backward);
    m.def("target_logprob", &target_logprob, arg("hidden"), arg("items"), arg("target"), arg("logprob"), arg("lse"), arg("rank"), arg("M"),
          arg("N"), arg("D"), arg("scale"), arg("skip_pad"), arg("ties_by_id"), arg("threads"), Release());
    m.def("target_logprob_backward", &target_logprob_backward, arg("hidden"), arg("items"), arg("target"), arg("grad"), arg("lse"),
          arg("d_hidden"), arg("d_items"), arg("M"), arg("N"), arg("D"), arg("scale"), arg("skip_pad"), arg("threads"), Release());
    m.def("keep_hidden", &keep_hidden, arg("key0"), arg("key1"), arg("threshold"), arg("site"), arg("step"), arg("layer"), arg("rows_ptr"),
          arg("positions_ptr"), arg("P"), arg("D"), arg("out_ptr"), Release());
    m.def("state_uniforms", &state_uniforms, arg("key0"), arg("key1"), arg("rows_ptr"), arg("positions_ptr"), arg("P"), arg("D"),
          arg("out_ptr"), Release());
    m.def("keep_attention", &keep_attention, arg("key0"), arg("key1"), arg("threshold"), arg("step"), arg("layer"), arg("rows_ptr"),
          arg("B"), arg("H"), arg("L"), arg("out_ptr"), Release());
    m.def("philox", &philox, arg("c0"), arg("c1"), arg("c2"), arg("c3"), arg("key0"), arg("key1"));
}
