// Philox4x32-10 and the keep-masks that it gives for addresses, without torch. docs/numerics.md defines the layout of the
// counter. lares_fast/_random.py computes the same bits in PyTorch.
#pragma once

#include <cstdint>

namespace lares_fast {

struct Key {
    std::uint32_t k0, k1;
};

// Ten rounds for LANES counters that differ in c0 only. The compiler vectorises over the lanes.
template <int LANES>
inline void philox(const std::uint32_t (&c0_in)[LANES], std::uint32_t c1_in, std::uint32_t c2_in, std::uint32_t c3_in, Key key,
                   std::uint32_t (&words)[4][LANES]) {
    std::uint32_t(&c0)[LANES] = words[0];
    std::uint32_t(&c1)[LANES] = words[1];
    std::uint32_t(&c2)[LANES] = words[2];
    std::uint32_t(&c3)[LANES] = words[3];
    for (int lane = 0; lane < LANES; ++lane) {
        c0[lane] = c0_in[lane];
        c1[lane] = c1_in;
        c2[lane] = c2_in;
        c3[lane] = c3_in;
    }
    for (int round = 0; round < 10; ++round) {
        for (int lane = 0; lane < LANES; ++lane) {
            const std::uint64_t p0 = std::uint64_t{c0[lane]} * 0xD2511F53u;
            const std::uint64_t p1 = std::uint64_t{c2[lane]} * 0xCD9E8D57u;
            c0[lane] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[lane] ^ key.k0;
            c2[lane] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[lane] ^ key.k1;
            c1[lane] = static_cast<std::uint32_t>(p1);
            c3[lane] = static_cast<std::uint32_t>(p0);
        }
        key.k0 += 0x9E3779B9u;
        key.k1 += 0xBB67AE85u;
    }
}

// One address gives 8 counters x 4 words x 2 halves, which are 64 random numbers of 16 bits. An element is kept if its
// number is at least the threshold. keep[word][2 * sub + half]; the low half of a word comes first.
inline void keep_tile(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, Key key, std::uint32_t threshold,
                      std::uint8_t (&keep)[4][16]) {
    std::uint32_t counters[8], words[4][8];
    for (std::uint32_t sub = 0; sub < 8; ++sub) counters[sub] = c0 | sub;
    philox(counters, c1, c2, c3, key, words);
    for (int word = 0; word < 4; ++word) {
        for (int sub = 0; sub < 8; ++sub) {
            keep[word][2 * sub] = (words[word][sub] & 0xFFFFu) >= threshold;
            keep[word][2 * sub + 1] = (words[word][sub] >> 16) >= threshold;
        }
    }
}

constexpr std::uint32_t SITE_ATTENTION = 3, SITE_STATE = 4;

struct MaskAddress {
    Key key;
    std::int64_t threshold, step, layer;
    const std::int64_t* rows;  // row numbers in the global batch
};

// Writes keep [P, D], one byte an element, for tokens at `address.rows` [P] and `positions` [P].
void keep_hidden(const MaskAddress& address, const std::int64_t* positions, std::int64_t site, std::int64_t P, std::int64_t D,
                 std::uint8_t* keep);

// Writes the uniform numbers in (0, 1) from which h0 is computed, [P, D], for tokens at `rows` [P] and `positions` [P].
void state_uniforms(Key key, const std::int64_t* rows, const std::int64_t* positions, std::int64_t P, std::int64_t D, double* out);

// Writes keep [B, H, L, L], one byte an element, indexed (row, head, query, key).
void keep_attention(const MaskAddress& address, std::int64_t B, std::int64_t H, std::int64_t L, std::uint8_t* keep);

}  // namespace lares_fast
