// The module lares_fast._C. Only this file and arguments.h know Python. Tensors arrive as addresses, which Python allocates after it
// has checked dtypes, devices and shapes (lares_fast/_native_call.py). The module trusts its caller that an address other than null
// is the memory that the sizes describe. Everything else is checked here or in the functions that it calls: types, sizes, and all
// indices in arrays. All arguments are passed by keyword, so none can take the place of another.
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

py::dict build_info(Arguments& arguments) {
    arguments.end();
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

py::tuple index_shape(Arguments& arguments) {
    const int64_t N = arguments.take<int64_t>("N"), D = arguments.take<int64_t>("D");
    arguments.end();
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

void build_index(Arguments& arguments) {
    lares_fast::IndexTables tables{};
    const float* const items = arguments.tensor<float>("items");
    const int64_t N = arguments.take<int64_t>("N"), D = arguments.take<int64_t>("D"), threads = arguments.take<int64_t>("threads");
    read_tables(arguments, "", tables);
    unlocked(arguments, [&] { lares_fast::build_index(items, N, D, tables, threads); });
}

void topk(Arguments& arguments) {
    lares_fast::Topk call{};
    read_catalog(arguments, call);
    arguments.read("k", call.k).read("scores", call.scores).read("ids", call.ids);
    if (arguments.has("index_centre")) read_tables(arguments, "index_", call.index);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::topk_cpu(call, threads); });
}

void target_rank(Arguments& arguments) {
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

void target_logprob(Arguments& arguments) {
    lares_fast::TargetLogprob call{};
    read_softmax(arguments, call.softmax);
    arguments.read("logprob", call.logprob).read("lse", call.lse).read("rank", call.rank).read("ties_by_id", call.ties_by_id);
    const int64_t threads = arguments.take<int64_t>("threads");
    unlocked(arguments, [&] { lares_fast::target_logprob_cpu(call, threads); });
}

void target_logprob_backward(Arguments& arguments) {
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
        // Beyond this number of layers the number of weights could overflow.
        if (call.shape.layers < 1 || call.shape.layers > 65535) throw std::invalid_argument("the number of layers must be in 1..65535");
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

void recurrence_forward(Arguments& arguments) {
    const RecurrenceArguments shared(arguments);
    float* const out = arguments.tensor<float>("out");
    unlocked(arguments, [&] { lares_fast::recurrence_forward(shared.call, out, shared.threads); });
}

void recurrence_backward(Arguments& arguments) {
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

std::string capability(Arguments& arguments) {
    const int device = arguments.take<int>("device");
    std::string answer;
    unlocked(arguments, [&] { answer = lares_fast::capability(device); });
    return answer;
}

DeviceLimits device_limits(Arguments& arguments) {
    const int device = arguments.take<int>("device");
    lares_fast::DeviceLimits limits{};
    unlocked(arguments, [&] { limits = lares_fast::device_limits(device); });
    return {limits.multiprocessors, limits.shared_a_block, limits.shared_a_multiprocessor};
}

py::dict walk_plan(const lares_fast::ScanPlan& walk) {
    using py::literals::operator""_a;
    return py::dict("query_tiles"_a = walk.query_tiles, "splits"_a = walk.splits, "item_tiles"_a = walk.item_tiles,
                    "chunks"_a = walk.chunks, "resident"_a = walk.resident, "shared_bytes"_a = walk.shared_bytes);
}

struct Sizes {
    int64_t B, N, D;
    DeviceLimits limits;

    explicit Sizes(Arguments& arguments) {
        arguments.read("B", B).read("N", N).read("D", D).read("limits", limits);
    }
};

py::dict plan_topk(Arguments& arguments) {
    const Sizes sizes(arguments);
    const int64_t k = arguments.take<int64_t>("k");
    arguments.end();
    const lares_fast::TopkPlan plan = lares_fast::plan_topk(sizes.B, sizes.N, sizes.D, k, limits_of(sizes.limits));
    py::dict all = walk_plan(plan.scan);
    all["stride"] = plan.stride;
    all["step"] = plan.step;
    all["sorted"] = plan.sorted;
    all["merge_warps"] = plan.merge_warps;
    all["workspace_bytes"] = plan.workspace_bytes;
    return all;
}

py::dict plan_target_rank(Arguments& arguments) {
    const Sizes sizes(arguments);
    arguments.end();
    return walk_plan(lares_fast::plan_target_rank(sizes.B, sizes.N, sizes.D, limits_of(sizes.limits)));
}

struct Launch {
    DeviceLimits limits;
    int device;
    uintptr_t stream;

    explicit Launch(Arguments& arguments)
        : limits(arguments.take<DeviceLimits>("limits")), device(arguments.take<int>("device")), stream(arguments.take<uintptr_t>("stream")) {}
};

std::string topk_cuda(Arguments& arguments) {
    lares_fast::TopkCuda call{};
    read_catalog(arguments, call);
    arguments.read("E", call.E).read("k", call.k).read("plain", call.plain);
    arguments.read("scores", call.scores).read("ids", call.ids).read("workspace", call.workspace);
    const Launch launch(arguments);
    std::string answer;
    unlocked(arguments, [&] { answer = lares_fast::topk_cuda(call, limits_of(launch.limits), launch.device, launch.stream); });
    return answer;
}

std::string target_rank_cuda(Arguments& arguments) {
    lares_fast::TargetRankCuda call{};
    read_catalog(arguments, call);
    arguments.read("E", call.E).read("plain", call.plain).read("ties_by_id", call.ties_by_id);
    arguments.read("target", call.target).read("of_all", call.of_all).read("of_kept", call.of_kept);
    const Launch launch(arguments);
    std::string answer;
    unlocked(arguments, [&] { answer = lares_fast::target_rank_cuda(call, limits_of(launch.limits), launch.device, launch.stream); });
    return answer;
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

void keep_hidden(Arguments& arguments) {
    const MaskAddress address = mask_address(arguments);
    const int64_t* const positions = arguments.tensor<int64_t>("positions");
    std::uint8_t* const keep = arguments.tensor<std::uint8_t>("keep");
    const int64_t site = arguments.take<int64_t>("site"), P = arguments.take<int64_t>("P"), D = arguments.take<int64_t>("D");
    unlocked(arguments, [&] { lares_fast::keep_hidden(address, positions, site, P, D, keep); });
}

void state_uniforms(Arguments& arguments) {
    const Key key = key_of(arguments.take<Words2>("key"));
    const int64_t* const rows = arguments.tensor<int64_t>("rows");
    const int64_t* const positions = arguments.tensor<int64_t>("positions");
    double* const uniforms = arguments.tensor<double>("uniforms");
    const int64_t P = arguments.take<int64_t>("P"), D = arguments.take<int64_t>("D");
    unlocked(arguments, [&] { lares_fast::state_uniforms(key, rows, positions, P, D, uniforms); });
}

void keep_attention(Arguments& arguments) {
    const MaskAddress address = mask_address(arguments);
    std::uint8_t* const keep = arguments.tensor<std::uint8_t>("keep");
    const int64_t B = arguments.take<int64_t>("B"), H = arguments.take<int64_t>("H"), L = arguments.take<int64_t>("L");
    unlocked(arguments, [&] { lares_fast::keep_attention(address, B, H, L, keep); });
}

Words4 philox(Arguments& arguments) {
    const auto counter = arguments.take<Words4>("counter");
    const Key key = key_of(arguments.take<Words2>("key"));
    arguments.end();
    const std::uint32_t first[1] = {counter[0]};
    std::uint32_t words[4][1];
    lares_fast::philox(first, counter[1], counter[2], counter[3], key, words);
    return {words[0][0], words[1][0], words[2][0], words[3][0]};
}

void use_level(Arguments& arguments) {
    const auto name = arguments.take<std::string>("name");
    arguments.end();
    lares_fast::use_level(name);
}

std::string level(Arguments& arguments) {
    arguments.end();
    return lares_fast::level_name();
}

bool has_bf16(Arguments& arguments) {
    arguments.end();
    return lares_fast::has(lares_fast::InstructionSet::avx512bf16);
}

// Adds `function` to the module. All functions take their arguments in one way, because the message of pybind11 about wrong
// arguments ends the process if a keyword cannot be encoded.
template <auto function>
void add(py::module_& module, const char* name) {
    module.def(name, [](const py::args& positional, const py::kwargs& given) {
        if (!positional.empty()) throw py::type_error("arguments are passed by keyword");
        Arguments arguments(given);
        return function(arguments);
    });
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.attr("ABI") = ABI;
    add<build_info>(m, "build_info");
    add<use_level>(m, "use_level");
    add<level>(m, "level");
    add<has_bf16>(m, "has_bf16");
    add<capability>(m, "capability");
    add<device_limits>(m, "device_limits");
    add<plan_topk>(m, "plan_topk");
    add<plan_target_rank>(m, "plan_target_rank");
    add<topk_cuda>(m, "topk_cuda");
    add<target_rank_cuda>(m, "target_rank_cuda");
    add<topk>(m, "topk");
    add<index_shape>(m, "index_shape");
    add<build_index>(m, "build_index");
    add<target_rank>(m, "target_rank");
    add<recurrence_forward>(m, "recurrence_forward");
    add<recurrence_backward>(m, "recurrence_backward");
    add<target_logprob>(m, "target_logprob");
    add<target_logprob_backward>(m, "target_logprob_backward");
    add<keep_hidden>(m, "keep_hidden");
    add<state_uniforms>(m, "state_uniforms");
    add<keep_attention>(m, "keep_attention");
    add<philox>(m, "philox");
}
