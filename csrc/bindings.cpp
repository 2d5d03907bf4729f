// The module lares_fast._C. Only this file and arguments.h know Python. Tensors arrive as addresses, which Python allocates after it
// has checked dtypes, devices and shapes (lares_fast/_native_call.py). All arguments are passed by keyword, so none can take the
// place of another.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "base/build_info.h"
#include "catalog/plan.h"
#include "cuda/capability.h"
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

using lares_fast::Arguments;
using lares_fast::Key;
using lares_fast::MaskAddress;
using lares_fast::pointer;
using lares_fast::unlocked;
using std::int64_t;
using std::uintptr_t;

// This number rises whenever the arguments of a function change. lares_fast/_native.py does not load a module with another one.
constexpr int ABI = 11;

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

py::tuple index_shape(int64_t N, int64_t D) {
    const lares_fast::IndexShape shape = lares_fast::index_shape(N, D);
    return py::make_tuple(shape.panel, shape.panels, shape.coded_panel, shape.coded_panels, shape.code_bytes, shape.lane_bytes);
}

void read_tables(Arguments& arguments, const std::string& prefix, lares_fast::IndexTables& tables) {
    const auto read = [&](const char* name, auto& place) { arguments.read((prefix + name).c_str(), place); };
    read("centre", tables.centre);
    read("scale", tables.scale);
    read("panels", tables.panels);
    read("codes", tables.codes);
    read("start", tables.start);
    read("bounds", tables.bounds);
}

// The arguments that topk and target_rank share, on the CPU and on CUDA devices.
template <class Call>
void read_catalog(Arguments& arguments, Call& call) {
    arguments.read("query", call.query)
        .read("items", call.items)
        .read("bias", call.bias)
        .read("exclude_offsets", call.exclude_offsets)
        .read("exclude_ids", call.exclude_ids)
        .read("B", call.B)
        .read("N", call.N)
        .read("D", call.D);
}

void build_index(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::IndexTables tables{};
    const float* const items = arguments.tensor<float>("items");
    const int64_t N = arguments.take<int64_t>("N"), D = arguments.take<int64_t>("D"), threads = arguments.take<int64_t>("threads");
    read_tables(arguments, "", tables);
    unlocked(arguments, [&] { lares_fast::build_index(items, N, D, tables, threads); });
}

void topk(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::Topk call{};
    read_catalog(arguments, call);
    arguments.read("k", call.k).read("scores", call.scores).read("ids", call.ids);
    if (arguments.has("index_centre")) read_tables(arguments, "index_", call.index);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::topk_cpu(call, threads); });
}

void target_rank(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::TargetRank call{};
    read_catalog(arguments, call);
    arguments.read("target", call.target).read("ties_by_id", call.ties_by_id);
    arguments.read("rank", call.rank).read("rank_of_all", call.rank_of_all);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::target_rank_cpu(call, threads); });
}

void read_softmax(Arguments& arguments, lares_fast::Softmax& softmax) {
    arguments.read("hidden", softmax.hidden)
        .read("items", softmax.items)
        .read("target", softmax.target)
        .read("M", softmax.M)
        .read("N", softmax.N)
        .read("D", softmax.D)
        .read("scale", softmax.scale)
        .read("skip_pad", softmax.skip_pad);
}

void target_logprob(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::TargetLogprob call{};
    read_softmax(arguments, call.softmax);
    arguments.read("logprob", call.logprob).read("lse", call.lse).read("rank", call.rank).read("ties_by_id", call.ties_by_id);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::target_logprob_cpu(call, threads); });
}

void target_logprob_backward(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::TargetLogprobBackward call{};
    read_softmax(arguments, call.softmax);
    arguments.read("grad", call.grad).read("lse", call.lse).read("d_hidden", call.d_hidden).read("d_items", call.d_items);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::target_logprob_backward_cpu(call, threads); });
}

// The arguments of a recurrence that both directions have.
struct RecurrenceArguments {
    std::vector<float*> weights;
    lares_fast::Recurrence call{};
    int64_t threads;

    explicit RecurrenceArguments(Arguments& arguments) {
        using lares_fast::Adapter;
        using lares_fast::Output;
        call.shape.adapter = arguments.one_of<Adapter>(
            "adapter", {{"none", Adapter::none}, {"add", Adapter::add}, {"linear", Adapter::linear}, {"concat", Adapter::concat}});
        call.output = arguments.one_of<Output>("output", {{"last", Output::last}, {"steps", Output::steps}, {"tokens", Output::tokens}});
        const auto key = arguments.take<std::array<std::uint32_t, 2>>("key");
        call.dropout.key = {key[0], key[1]};
        arguments.read("hidden_threshold", call.dropout.hidden)
            .read("attention_threshold", call.dropout.attention)
            .read("first_step", call.dropout.first_step)
            .read("width", call.shape.D)
            .read("n_heads", call.shape.H)
            .read("inner_size", call.shape.I)
            .read("n_layers", call.shape.layers)
            .read("eps", call.eps)
            .read("h", call.h)
            .read("pre", call.pre)
            .read("offsets", call.offsets)
            .read("depth", call.depth)
            .read("rows", call.rows)
            .read("batch", call.B)
            .read("tape", call.tape)
            .read("bf16", call.bf16)
            .read("threads", threads);
        weights = pointers(arguments, "weights");
        call.weights = weights.data();
    }

    // One tensor for each weight.
    std::vector<float*> pointers(Arguments& arguments, const char* name) const {
        std::vector<float*> result;
        for (const uintptr_t address : arguments.take<std::vector<uintptr_t>>(name)) result.push_back(pointer<float>(address));
        if (lares_fast::weight_count(call.shape) != static_cast<int64_t>(result.size()))
            throw std::invalid_argument(std::string("the number of ") + name + " is wrong");
        return result;
    }
};

void recurrence_forward(const py::kwargs& given) {
    Arguments arguments(given);
    const RecurrenceArguments shared(arguments);
    float* const out = arguments.tensor<float>("out");
    unlocked(arguments, [&] { lares_fast::recurrence_forward(shared.call, out, shared.threads); });
}

void recurrence_backward(const py::kwargs& given) {
    Arguments arguments(given);
    const RecurrenceArguments shared(arguments);
    const float* const out_grad = arguments.tensor<float>("out_grad");
    float* const h_grad = arguments.tensor<float>("h_grad");
    float* const pre_grad = arguments.tensor<float>("pre_grad");
    const std::vector<float*> weight_grads = shared.pointers(arguments, "weight_grads");
    unlocked(arguments, [&] {
        lares_fast::recurrence_backward(shared.call, out_grad, h_grad, pre_grad, weight_grads.data(), shared.threads);
    });
}

// Multiprocessors, shared memory a block, shared memory a multiprocessor.
using DeviceLimits = std::array<int64_t, 3>;

lares_fast::DeviceLimits limits_of(const DeviceLimits& limits) { return {limits[0], limits[1], limits[2]}; }

DeviceLimits device_limits(int device) {
    const lares_fast::DeviceLimits limits = lares_fast::device_limits(device);
    return {limits.multiprocessors, limits.shared_a_block, limits.shared_a_multiprocessor};
}

py::dict walk_plan(const lares_fast::ScanPlan& walk) {
    using py::literals::operator""_a;
    return py::dict("query_tiles"_a = walk.query_tiles, "splits"_a = walk.splits, "item_tiles"_a = walk.item_tiles,
                    "chunks"_a = walk.chunks, "resident"_a = walk.resident, "shared_bytes"_a = walk.shared_bytes);
}

py::dict plan_topk(int64_t B, int64_t N, int64_t D, int64_t k, const DeviceLimits& limits) {
    const lares_fast::TopkPlan plan = lares_fast::plan_topk(B, N, D, k, limits_of(limits));
    py::dict all = walk_plan(plan.scan);
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

struct Launch {
    DeviceLimits limits;
    int device;
    uintptr_t stream;

    explicit Launch(Arguments& arguments)
        : limits(arguments.take<DeviceLimits>("limits")), device(arguments.take<int>("device")), stream(arguments.take<uintptr_t>("stream")) {}
};

std::string topk_cuda(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::TopkCuda call{};
    read_catalog(arguments, call);
    arguments.read("E", call.E).read("k", call.k).read("plain", call.plain);
    arguments.read("scores", call.scores).read("ids", call.ids).read("workspace", call.workspace);
    const Launch launch(arguments);
    return unlocked(arguments, [&] { return lares_fast::topk_cuda(call, limits_of(launch.limits), launch.device, launch.stream); });
}

std::string target_rank_cuda(const py::kwargs& given) {
    Arguments arguments(given);
    lares_fast::TargetRankCuda call{};
    read_catalog(arguments, call);
    arguments.read("E", call.E).read("plain", call.plain).read("ties_by_id", call.ties_by_id);
    arguments.read("target", call.target).read("of_all", call.of_all).read("of_kept", call.of_kept);
    const Launch launch(arguments);
    return unlocked(arguments,
                    [&] { return lares_fast::target_rank_cuda(call, limits_of(launch.limits), launch.device, launch.stream); });
}

using Words2 = std::array<std::uint32_t, 2>;
using Words4 = std::array<std::uint32_t, 4>;

Key key_of(const Words2& key) { return {key[0], key[1]}; }

MaskAddress mask_address(Arguments& arguments) {
    MaskAddress address{};
    address.key = key_of(arguments.take<Words2>("key"));
    arguments.read("threshold", address.threshold).read("step", address.step).read("layer", address.layer).read("rows", address.rows);
    return address;
}

void keep_hidden(const py::kwargs& given) {
    Arguments arguments(given);
    const MaskAddress address = mask_address(arguments);
    const int64_t* const positions = arguments.tensor<int64_t>("positions");
    std::uint8_t* const keep = arguments.tensor<std::uint8_t>("keep");
    const int64_t site = arguments.take<int64_t>("site"), P = arguments.take<int64_t>("P"), D = arguments.take<int64_t>("D");
    unlocked(arguments, [&] { lares_fast::keep_hidden(address, positions, site, P, D, keep); });
}

void state_uniforms(const py::kwargs& given) {
    Arguments arguments(given);
    const Key key = key_of(arguments.take<Words2>("key"));
    const int64_t* const rows = arguments.tensor<int64_t>("rows");
    const int64_t* const positions = arguments.tensor<int64_t>("positions");
    double* const uniforms = arguments.tensor<double>("uniforms");
    const int64_t P = arguments.take<int64_t>("P"), D = arguments.take<int64_t>("D");
    unlocked(arguments, [&] { lares_fast::state_uniforms(key, rows, positions, P, D, uniforms); });
}

void keep_attention(const py::kwargs& given) {
    Arguments arguments(given);
    const MaskAddress address = mask_address(arguments);
    std::uint8_t* const keep = arguments.tensor<std::uint8_t>("keep");
    const int64_t B = arguments.take<int64_t>("B"), H = arguments.take<int64_t>("H"), L = arguments.take<int64_t>("L");
    unlocked(arguments, [&] { lares_fast::keep_attention(address, B, H, L, keep); });
}

Words4 philox(const Words4& counter, const Words2& key) {
    const std::uint32_t first[1] = {counter[0]};
    std::uint32_t words[4][1];
    lares_fast::philox(first, counter[1], counter[2], counter[3], key_of(key), words);
    return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using py::arg;
    using Release = py::call_guard<py::gil_scoped_release>;
    m.attr("ABI") = ABI;
    m.def("build_info", &build_info);
    m.def("use_level", &lares_fast::use_level, py::kw_only(), arg("name"));
    m.def("level", &lares_fast::level_name);
    m.def("has_bf16", [] { return lares_fast::has(lares_fast::InstructionSet::avx512bf16); });
    m.def("capability", &lares_fast::capability, py::kw_only(), arg("device"), Release());
    m.def("device_limits", &device_limits, py::kw_only(), arg("device"), Release());
    m.def("plan_topk", &plan_topk, py::kw_only(), arg("B"), arg("N"), arg("D"), arg("k"), arg("limits"));
    m.def("plan_target_rank", &plan_target_rank, py::kw_only(), arg("B"), arg("N"), arg("D"), arg("limits"));
    m.def("topk_cuda", &topk_cuda);
    m.def("target_rank_cuda", &target_rank_cuda);
    m.def("topk", &topk);
    m.def("index_shape", &index_shape, py::kw_only(), arg("N"), arg("D"));
    m.def("build_index", &build_index);
    m.def("target_rank", &target_rank);
    m.def("recurrence_forward", &recurrence_forward);
    m.def("recurrence_backward", &recurrence_backward);
    m.def("target_logprob", &target_logprob);
    m.def("target_logprob_backward", &target_logprob_backward);
    m.def("keep_hidden", &keep_hidden);
    m.def("state_uniforms", &state_uniforms);
    m.def("keep_attention", &keep_attention);
    m.def("philox", &philox, py::kw_only(), arg("counter"), arg("key"));
}
