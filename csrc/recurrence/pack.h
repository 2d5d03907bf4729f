// Weights from the reference's tensors to panels, gradients back.
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

// How the elements of matrices are packed: as they are, rounded to bf16, or in pairs of bf16 as Bf16Kernel says.
enum class Elements { exact, rounded, pairs };

// `backward` packs what only gradients are multiplied with, too; their elements are exact.
void pack(const Shape& s, const float* const* weights, bool backward, Elements elements, PackedModel& to);

void unpack(const Shape& s, const float* const* weights, const GradientSlot& from, float* const* weight_grads);

}  // namespace lares_fast
