#include "recurrence/recurrence.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "base/parallel.h"
#include "base/require.h"
#include "memory/pool.h"
#include "recurrence/pack.h"
#include "recurrence/plan.h"
#include "simd/dispatch.h"

namespace lares_fast {

LARES_DISPATCH(LARES_FLOAT_SETS, RecurrenceKernel, recurrence_kernel)
LARES_DISPATCH(LARES_BF16_SETS, Bf16Kernel, bf16_kernel)

namespace {

// The number of sets of gradients. Blocks are added to the sets in turn. The number is fixed, so that the number of threads
// does not change the sums, and so that each sum is short.
constexpr std::int64_t SLOTS = 8;
constexpr std::int64_t MAX_WIDTH = 256, MAX_LENGTH = 512, MAX_STEPS = 65535;

bool all_there(const float* const* pointers, std::int64_t count) {
    return pointers && std::find(pointers, pointers + count, nullptr) == pointers + count;
}

void check(const Recurrence& c, std::int64_t threads) {
    const Shape& s = c.shape;
    require(threads >= 1, "threads must be at least 1");
    require(s.D >= COLUMNS && s.D <= MAX_WIDTH && s.D % COLUMNS == 0, "the width must be a multiple of 16 up to 256");
    require(s.I >= COLUMNS && s.I <= 65536 && s.I % COLUMNS == 0, "the inner size must be a multiple of 16 up to 65536");
    require(s.H >= 1 && s.D % s.H == 0, "the number of heads must divide the width");
    require(s.layers >= 1 && s.layers < 65536, "the number of layers must be in 1..65535");
    require(c.dropout.hidden < 65536 && c.dropout.attention < 65536, "dropout thresholds must be in [0, 65536)");
    require(!c.bf16 || !c.tape, "bf16 has no backward: tape must be a null pointer");
    require(c.B >= 0 && c.B <= std::numeric_limits<std::int32_t>::max(), "B must be in 0..2^31 - 1");
    require(all_there(c.weights, weight_count(s)), "weights must not be null pointers");
    if (c.B == 0) return;
    require(c.offsets && c.depth && c.h, "offsets, depth and h must not be null pointers");
    require(c.pre || s.adapter == Adapter::none, "pre must not be a null pointer");
    require(c.rows || (!c.dropout.hidden && !c.dropout.attention), "rows must not be a null pointer");
    require(c.offsets[0] == 0, "offsets must begin with 0");
    for (std::int64_t b = 0; b < c.B; ++b) {
        require(c.offsets[b + 1] > c.offsets[b] && c.offsets[b + 1] - c.offsets[b] <= MAX_LENGTH, "lengths must be in 1..512");
        require(c.depth[b] >= 1 && c.depth[b] <= MAX_STEPS - std::int64_t{c.dropout.first_step}, "depth must be in 1..65534");
        require(!c.rows || (c.rows[b] >= 0 && c.rows[b] <= std::numeric_limits<std::uint32_t>::max()), "rows must be in [0, 2**32)");
    }
}

// The plan and the packed weights of a call. It runs the blocks.
class Run {
public:
    Run(const Recurrence& call, bool backward) : call_(call), plan_(make_plan(call)), backward_(backward) {
        Carver size(nullptr);
        carve_model(size, call.shape);
        weights_ = take_from_pool(size.used());
        Carver c(weights_.get());
        packed_ = carve_model(c, call.shape);
        pack(call.shape, call.weights, backward, elements(), packed_);
        model_ = {call.shape, packed_.layers.data(), packed_.adapter, call.eps, call.dropout, call.output};
    }

    std::int64_t blocks() const { return static_cast<std::int64_t>(plan_.blocks.size()); }
    const Model& model() const { return model_; }

    PooledFloats workspace() const {
        return take_from_pool(best_recurrence_kernel()->workspace(call_.shape, plan_.tokens, plan_.longest, backward_));
    }

    const Block& block(std::int64_t i) const { return plan_.blocks[static_cast<std::size_t>(i)]; }

    std::int64_t tape_floats() const { return plan_.tape_rows * (2 * call_.shape.D + 2); }

    void forward(std::int64_t i, float* out, float* memory) const {
        const auto run = call_.bf16 ? best_bf16_kernel()->forward : best_recurrence_kernel()->forward;
        run(model_, block(i), call_.h, call_.pre, out, memory);
    }

private:
    Elements elements() const {
        if (!call_.bf16) return Elements::exact;
        return best_bf16_kernel()->pairs ? Elements::pairs : Elements::rounded;
    }

    const Recurrence& call_;
    Plan plan_;
    bool backward_;
    PooledFloats weights_;
    PackedModel packed_;
    Model model_;
};

}  // namespace

void recurrence_forward(const Recurrence& call, float* out, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    require(out, "out must not be a null pointer");
    const Run run(call, false);
    if (call.tape) prefer_large_pages(call.tape, run.tape_floats());
    std::atomic<std::int64_t> next{0};
    run_on_threads(std::min(threads, run.blocks()), [&] {
        const PooledFloats workspace = run.workspace();
        for (std::int64_t i; (i = next.fetch_add(1)) < run.blocks();) {
            run.forward(i, out, workspace.get());
        }
    });
}

void recurrence_backward(const Recurrence& call, const float* out_grad, float* h_grad, float* pre_grad, float* const* weight_grads,
                         std::int64_t threads) {
    check(call, threads);
    if (call.B > 0) {
        require(call.tape && out_grad && h_grad, "tape, out_grad and h_grad must not be null pointers");
        require(pre_grad || call.shape.adapter == Adapter::none, "pre_grad must not be a null pointer");
    }
    require(all_there(weight_grads, weight_count(call.shape)), "weight_grads must not be null pointers");
    Carver size(nullptr);
    carve_slot(size, call.shape);
    const std::int64_t floats = size.used();
    const PooledFloats memory = take_from_pool(SLOTS * floats);
    std::memset(memory.get(), 0, sizeof(float) * static_cast<std::size_t>(SLOTS * floats));
    std::vector<GradientSlot> slots;
    for (std::int64_t i = 0; i < SLOTS; ++i) {
        Carver c(memory.get() + i * floats);
        slots.push_back(carve_slot(c, call.shape));
    }
    for (GradientSlot& slot : slots) slot.adapter.share = &slot.share;
    if (call.B > 0) {
        const Run run(call, true);
        std::atomic<std::int64_t> next{0};
        run_on_threads(std::min({threads, SLOTS, run.blocks()}), [&] {
            const PooledFloats workspace = run.workspace();
            for (std::int64_t slot; (slot = next.fetch_add(1)) < SLOTS;) {
                GradientSlot& sums = slots[static_cast<std::size_t>(slot)];
                for (std::int64_t i = slot; i < run.blocks(); i += SLOTS) {
                    best_recurrence_kernel()->backward(run.model(), run.block(i), call.h, call.pre, out_grad, h_grad, pre_grad,
                                                 {sums.layers.data(), sums.adapter}, workspace.get());
                }
            }
        });
        for (std::int64_t slot = 1; slot < SLOTS; ++slot) {
            slots[0].share += slots[static_cast<std::size_t>(slot)].share;
            for (std::int64_t i = 0; i < floats; ++i) memory[static_cast<std::size_t>(i)] += memory[static_cast<std::size_t>(slot * floats + i)];
        }
    }
    unpack(call.shape, call.weights, slots[0], weight_grads);
}

}  // namespace lares_fast
