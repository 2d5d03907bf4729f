#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "random/philox.h"

namespace lares_fast {
namespace {

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// The counter's fields have fixed widths; a value outside would silently share another address's draws.
void check(const MaskAddress& address, std::int64_t B) {
    require(B >= 0, "the number of rows must not be negative");
    require(address.threshold >= 0 && address.threshold <= 65536, "threshold must be in [0, 65536]");
    require(address.step >= 0 && address.step < 65536, "step must be in [0, 65536)");
    require(address.layer >= 0 && address.layer < 65536, "layer must be in [0, 65536)");
    require(B == 0 || address.rows != nullptr, "rows must not be a null pointer");
    for (std::int64_t b = 0; b < B; ++b) {
        require(address.rows[b] >= 0 && address.rows[b] < (std::int64_t{1} << 32), "rows must be in [0, 2**32)");
    }
}

std::uint32_t step_and_layer(const MaskAddress& address) {
    return static_cast<std::uint32_t>(address.step << 16 | address.layer);
}

}  // namespace

void keep_hidden(const MaskAddress& address, std::int64_t site, std::int64_t B, std::int64_t L, std::int64_t D, std::uint8_t* keep) {
    check(address, B);
    require(site >= 0 && site < 65536, "site must be in [0, 65536)");
    require(L >= 0 && L < (std::int64_t{1} << 32), "length must be in [0, 2**32)");
    require(D >= 0 && D <= 64 * 8192, "width must be in [0, 524288]");
    if (B == 0 || L == 0 || D == 0) return;
    require(keep != nullptr, "out must not be a null pointer");
    std::uint8_t tile[4][16];
    for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t position = 0; position < L; ++position) {
            for (std::int64_t column = 0; column < D; column += 64) {
                keep_tile(static_cast<std::uint32_t>(column / 64 << 3 | site << 16), static_cast<std::uint32_t>(position),
                          static_cast<std::uint32_t>(address.rows[b]), step_and_layer(address), address.key,
                          static_cast<std::uint32_t>(address.threshold), tile);
                std::memcpy(keep + (b * L + position) * D + column, tile, static_cast<std::size_t>(std::min<std::int64_t>(64, D - column)));
            }
        }
    }
}

void keep_attention(const MaskAddress& address, std::int64_t B, std::int64_t H, std::int64_t L, std::uint8_t* keep) {
    check(address, B);
    require(H >= 0 && H <= 8192, "heads must be in [0, 8192]");
    require(L >= 0 && L <= 4 * 65536, "length must be in [0, 262144]");
    if (B == 0 || H == 0 || L == 0) return;
    require(keep != nullptr, "out must not be a null pointer");
    std::uint8_t tile[4][16];
    for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t head = 0; head < H; ++head) {
            std::uint8_t* const plane = keep + (b * H + head) * L * L;
            for (std::int64_t query = 0; query < L; query += 4) {
                for (std::int64_t column = 0; column < L; column += 16) {
                    keep_tile(static_cast<std::uint32_t>(head << 3 | std::int64_t{SITE_ATTENTION} << 16),
                              static_cast<std::uint32_t>(query / 4 | column / 16 << 16), static_cast<std::uint32_t>(address.rows[b]),
                              step_and_layer(address), address.key, static_cast<std::uint32_t>(address.threshold), tile);
                    const auto columns = static_cast<std::size_t>(std::min<std::int64_t>(16, L - column));
                    for (std::int64_t word = 0; word < std::min<std::int64_t>(4, L - query); ++word) {
                        std::memcpy(plane + (query + word) * L + column, tile[word], columns);
                    }
                }
            }
        }
    }
}

}  // namespace lares_fast
