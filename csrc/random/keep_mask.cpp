#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "base/require.h"
#include "random/philox.h"

namespace lares_fast {
namespace {

// The fields of the counter have fixed widths. A larger value would silently use the random numbers of another address.
void check(const std::int64_t* values, std::int64_t count, const std::string& name) {
    if (count > 0 && !values) throw std::invalid_argument(name + " must not be a null pointer");
    for (std::int64_t i = 0; i < count; ++i) {
        if (values[i] < 0 || values[i] >= std::int64_t{1} << 32) throw std::invalid_argument(name + " must be in [0, 2**32)");
    }
}

// `width` is the number of elements of a row. It is checked first.
void check_rows(std::int64_t rows, std::int64_t width) {
    require(rows >= 0, "the number of rows must not be negative");
    require(rows <= std::numeric_limits<std::int64_t>::max() / 8 / std::max<std::int64_t>(width, 1), "there are too many rows");
}

void check(const MaskAddress& address, std::int64_t B, std::int64_t width) {
    check_rows(B, width);
    require(address.threshold >= 0 && address.threshold <= 65536, "threshold must be in [0, 65536]");
    require(address.step >= 0 && address.step < 65536, "step must be in [0, 65536)");
    require(address.layer >= 0 && address.layer < 65536, "layer must be in [0, 65536)");
    check(address.rows, B, "rows");
}

std::uint32_t step_and_layer(const MaskAddress& address) {
    return static_cast<std::uint32_t>(address.step << 16 | address.layer);
}

}  // namespace

void keep_hidden(const MaskAddress& address, const std::int64_t* positions, std::int64_t site, std::int64_t P, std::int64_t D,
                 std::uint8_t* keep) {
    require(site >= 0 && site < 65536, "site must be in [0, 65536)");
    require(D >= 0 && D <= 64 * 8192, "width must be in [0, 524288]");
    check(address, P, D);
    check(positions, P, "positions");
    if (P == 0 || D == 0) return;
    require(keep != nullptr, "out must not be a null pointer");
    std::uint8_t tile[4][16];
    for (std::int64_t i = 0; i < P; ++i) {
        for (std::int64_t column = 0; column < D; column += 64) {
            keep_tile(static_cast<std::uint32_t>(column / 64 << 3 | site << 16), static_cast<std::uint32_t>(positions[i]),
                      static_cast<std::uint32_t>(address.rows[i]), step_and_layer(address), address.key,
                      static_cast<std::uint32_t>(address.threshold), tile);
            std::memcpy(keep + i * D + column, tile, static_cast<std::size_t>(std::min<std::int64_t>(64, D - column)));
        }
    }
}

void state_uniforms(Key key, const std::int64_t* rows, const std::int64_t* positions, std::int64_t P, std::int64_t D, double* out) {
    require(D >= 0 && D <= 4 * 65536, "width must be in [0, 262144]");
    check_rows(P, D);
    check(rows, P, "rows");
    check(positions, P, "positions");
    if (P == 0 || D == 0) return;
    require(out != nullptr, "out must not be a null pointer");
    constexpr std::int64_t CALLS = 8;
    std::uint32_t counters[CALLS], words[4][CALLS];
    for (std::int64_t i = 0; i < P; ++i) {
        for (std::int64_t column = 0; column < D; column += 4 * CALLS) {
            for (std::int64_t call = 0; call < CALLS; ++call) counters[call] = static_cast<std::uint32_t>(column / 4 + call) | SITE_STATE << 16;
            philox(counters, static_cast<std::uint32_t>(positions[i]), static_cast<std::uint32_t>(rows[i]), 0u, key, words);
            for (std::int64_t d = column; d < std::min(D, column + 4 * CALLS); ++d) {
                out[i * D + d] = (words[d % 4][(d - column) / 4] + 0.5) / 4294967296.0;
            }
        }
    }
}

void keep_attention(const MaskAddress& address, std::int64_t B, std::int64_t H, std::int64_t L, std::uint8_t* keep) {
    require(H >= 0 && H <= 8192, "heads must be in [0, 8192]");
    require(L >= 0 && L <= 4 * 65536, "length must be in [0, 262144]");
    check(address, B, H * L * L);
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
