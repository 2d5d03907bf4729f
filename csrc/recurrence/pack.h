// Copies weights from the reference's tensors to panels, and gradients back.
#pragma once

#include <cstdint>
#include <vector>

#include "recurrence/layout.h"

namespace lares_fast {

struct PackedModel {
    std::vector<LayerWeights> layers;
    AdapterWeights adapter;
};

struct GradientSlot {
    std::vector<LayerGradients> layers;
    AdapterGradients adapter;
    // The sum that adapter.share points to. It is one number with a term for every element of every step.
    double share = 0.0;
};

inline PackedModel carve_model(Carver& c, const Shape& s) {
    PackedModel model;
    model.adapter = carve_adapter_weights(c, s);
    for (std::int64_t i = 0; i < s.layers; ++i) model.layers.push_back(carve_weights(c, s));
    return model;
}

inline GradientSlot carve_slot(Carver& c, const Shape& s) {
    GradientSlot slot;
    slot.adapter = carve_adapter_gradients(c, s);
    for (std::int64_t i = 0; i < s.layers; ++i) slot.layers.push_back(carve_gradients(c, s));
    return slot;
}

// The elements of packed matrices: exact, rounded to bf16, or pairs of bf16 (see Bf16Kernel).
enum class Elements { exact, rounded, pairs };

// With `backward` the panels that gradients are multiplied with are packed too. Their elements are exact.
void pack(const Shape& s, const float* const* weights, bool backward, Elements elements, PackedModel& to);

void unpack(const Shape& s, const float* const* weights, const GradientSlot& from, float* const* weight_grads);

}  // namespace lares_fast
