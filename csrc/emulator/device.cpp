// The emulated device: fibers, barriers, warp operations, delayed copies, and the information about them for ASan and TSan.
#include "emulator/device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(LARES_EMULATOR_TSAN)
// This file is compiled without -fsanitize=thread, because the emulator's state is not memory of the kernel.
#include <sanitizer/tsan_interface.h>
#endif

// Saves the callee-saved registers and the stack pointer in *from, and continues where `to` was left.
extern "C" void lares_switch_stack(void** from, void* to);
asm(R"(
.text
.type lares_switch_stack, @function
lares_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size lares_switch_stack, .-lares_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");

namespace lares_fast::emulator {
namespace {

constexpr int WARP_LANES = 32;
constexpr std::size_t STACK = std::size_t{1} << 18;

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    int index = 0;
    bool live = false;
    // The fiber is blocked while *generation == seen.
    const unsigned* generation = nullptr;
    unsigned seen = 0;
    SourceLine site{};
    std::vector<Copy> copies;
    void* fake_stack = nullptr;
    void* thread = nullptr;
};

struct Cargo {
    unsigned char bytes[24];
};

struct WarpState {
    unsigned arrived = 0, mask = 0, generation = 0, gone = 0;
    const char* operation = nullptr;
    SourceLine site{};
    // What the lanes bring to the current operation, and what they brought to the last one.
    Cargo brought[WARP_LANES], given[WARP_LANES];
    char order[2];  // marks __syncwarp for TSan
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<WarpState> warps;
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_size = 0;
    void* scheduler_thread = nullptr;
    const std::function<void()>* body = nullptr;
    unsigned arrived = 0, live = 0, generation = 0;
    SourceLine barrier{};
    char order[2];  // marks __syncthreads for TSan
    char whole_block = 0;
    dim3 block{}, threads{};
    char* shared = nullptr;
};

Machine machine;

[[noreturn]] void fail(const char* what, const Fiber& fiber, SourceLine site) {
    const dim3 block = machine.block;
    std::printf("EMULATOR: %s: thread %d of block (%u, %u) at %s:%d\n", what, fiber.index, block.x, block.y, site.file, site.line);
    std::fflush(stdout);
    std::_Exit(3);
}

#if defined(LARES_EMULATOR_TSAN)
void happens_before(void* mark) { __tsan_release(mark); }
void happens_after(void* mark) { __tsan_acquire(mark); }
#else
void happens_before(void*) {}
void happens_after(void*) {}
#endif

void to_scheduler(bool last) {
    Fiber& fiber = *machine.current;
#if defined(LARES_EMULATOR_TSAN)
    __tsan_switch_to_fiber(machine.scheduler_thread, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
    (void)last;
    lares_switch_stack(&fiber.stack_pointer, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
    machine.current = &fiber;
#if defined(LARES_EMULATOR_TSAN)
    __tsan_switch_to_fiber(fiber.thread, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, STACK);
#endif
    lares_switch_stack(&machine.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void wait_for(const unsigned* generation, unsigned seen, SourceLine site) {
    Fiber& fiber = *machine.current;
    fiber.generation = generation;
    fiber.seen = seen;
    fiber.site = site;
    to_scheduler(false);
}

void open_barrier() {
    machine.arrived = 0;
    ++machine.generation;
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
    happens_after(&machine.whole_block);
    (*machine.body)();
    Fiber& fiber = *machine.current;
    if (!fiber.copies.empty()) fail("copies that were not waited for", fiber, fiber.site);
    happens_before(&machine.whole_block);
    fiber.live = false;
    machine.warps[fiber.index / WARP_LANES].gone |= 1u << fiber.index % WARP_LANES;
    --machine.live;
    if (machine.live > 0 && machine.arrived == machine.live) open_barrier();
    to_scheduler(true);
    std::abort();
}

// One lane's part in an operation of its warp. It leaves `value`, and returns when all lanes of the mask have arrived.
WarpState& meet(const char* operation, unsigned mask, const void* value, std::size_t bytes, SourceLine site) {
    Fiber& fiber = *machine.current;
    WarpState& warp = machine.warps[fiber.index / WARP_LANES];
    const int lane = fiber.index % WARP_LANES;
    if (mask != 0xffffffffu) fail("a mask that is not the whole warp", fiber, site);
    if (warp.gone) fail("a warp operation after some lanes have ended", fiber, site);
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.site = site;
    } else if (warp.operation != operation || warp.site.line != site.line || std::strcmp(warp.site.file, site.file) != 0) {
        fail("lanes of a warp at different operations", fiber, site);
    }
    // A loop instead of memcpy, because TSan checks the memory of memcpy even when this file calls it.
    for (std::size_t i = 0; i < bytes; ++i) warp.brought[lane].bytes[i] = static_cast<const unsigned char*>(value)[i];
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) {
        for (int i = 0; i < WARP_LANES; ++i) warp.given[i] = warp.brought[i];
        warp.arrived = 0;
        ++warp.generation;
    } else {
        wait_for(&warp.generation, warp.generation, site);
    }
    return warp;
}

void prepare(Fiber& fiber, int index) {
    if (!fiber.stack) {
        fiber.stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
#if defined(LARES_EMULATOR_TSAN)
    if (!fiber.thread) fiber.thread = __tsan_create_fiber(0);
#endif
    fiber.index = index;
    fiber.live = true;
    fiber.generation = nullptr;
    fiber.fake_stack = nullptr;
    // The stack holds six registers, the address that the switch returns to, and an unused return address. So it is aligned
    // as it is at a call.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&run_fiber);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

void run_block(int threads, std::mt19937* random) {
    machine.live = static_cast<unsigned>(threads);
    machine.arrived = 0;
    if (machine.fibers.size() < static_cast<std::size_t>(threads)) machine.fibers.resize(static_cast<std::size_t>(threads));
    machine.warps.assign(static_cast<std::size_t>((threads + WARP_LANES - 1) / WARP_LANES), WarpState{});
    std::vector<int> order(static_cast<std::size_t>(threads));
    std::iota(order.begin(), order.end(), 0);
    for (int i = 0; i < threads; ++i) prepare(machine.fibers[static_cast<std::size_t>(i)], i);
    happens_before(&machine.whole_block);
    while (machine.live > 0) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        bool progress = false;
        for (const int i : order) {
            Fiber& fiber = machine.fibers[static_cast<std::size_t>(i)];
            if (!fiber.live || (fiber.generation && *fiber.generation == fiber.seen)) continue;
            fiber.generation = nullptr;
            progress = true;
            to_fiber(fiber);
        }
        if (progress) continue;
        for (const Fiber& fiber : machine.fibers) {
            if (fiber.live) fail("deadlock", fiber, fiber.site);
        }
    }
    happens_after(&machine.whole_block);
}

struct SlowPath {
    const char* name;
    long long count;
};

// Names fill the array from its beginning.
SlowPath slow_paths[8];

SlowPath& find_slow_path(const char* name) {
    for (SlowPath& path : slow_paths) {
        if (!path.name) path.name = name;
        if (std::strcmp(path.name, name) == 0) return path;
    }
    std::abort();
}

}  // namespace

dim3 thread_index() { return dim3(static_cast<unsigned>(machine.current->index), 0, 0); }
dim3 block_index() { return machine.block; }
dim3 block_size() { return machine.threads; }
char* shared_memory() { return machine.shared; }

void block_barrier(SourceLine site) {
    Fiber& fiber = *machine.current;
    char* const order = machine.order + machine.generation % 2;
    if (machine.arrived == 0) {
        machine.barrier = site;
    } else if (machine.barrier.line != site.line) {
        fail("threads of a block at different barriers", fiber, site);
    }
    happens_before(order);
    if (++machine.arrived == machine.live) {
        open_barrier();
    } else {
        wait_for(&machine.generation, machine.generation, site);
    }
    happens_after(order);
}

void warp_barrier(unsigned mask, SourceLine site) {
    WarpState& warp = machine.warps[machine.current->index / WARP_LANES];
    char* const order = warp.order + warp.generation % 2;
    happens_before(order);
    meet("__syncwarp", mask, nullptr, 0, site);
    happens_after(order);
}

void shuffle(unsigned mask, void* value, std::size_t bytes, int from, SourceLine site) {
    if (from < 0 || from >= WARP_LANES) fail("a shuffle from a lane that does not exist", *machine.current, site);
    const Cargo& cargo = meet("shuffle", mask, value, bytes, site).given[from];
    for (std::size_t i = 0; i < bytes; ++i) static_cast<unsigned char*>(value)[i] = cargo.bytes[i];
}

unsigned ballot(unsigned mask, bool vote, SourceLine site) {
    const WarpState& warp = meet("vote", mask, &vote, sizeof vote, site);
    unsigned votes = 0;
    for (int lane = 0; lane < WARP_LANES; ++lane) votes |= unsigned{warp.given[lane].bytes[0]} << lane;
    return votes;
}

void remember(const Copy& copy, SourceLine site) {
    const std::uintptr_t bytes = sizeof(float) * static_cast<std::uintptr_t>(copy.floats);
    if (reinterpret_cast<std::uintptr_t>(copy.to) % bytes || reinterpret_cast<std::uintptr_t>(copy.from) % bytes) {
        fail("a misaligned copy", *machine.current, site);
    }
    machine.current->site = site;
    machine.current->copies.push_back(copy);
}

bool recall(Copy& copy) {
    std::vector<Copy>& copies = machine.current->copies;
    if (copies.empty()) return false;
    copy = copies.back();
    copies.pop_back();
    return true;
}

// Fragments follow the tables of the PTX manual, mma.m16n8k8 with .tf32: group = lane / 4, member = lane % 4;
// a_i: row group (+ 8 for i = 1, 3), column member (+ 4 for i >= 2); b_i: row member (+ 4 for i = 1), column group;
// c_i: row group (+ 8 for i >= 2), column 2 member + i % 2.
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], SourceLine site) {
    std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    for (const std::uint32_t operand : mine) {
        if (operand & 0x1fffu) fail("an operand of mma that is not rounded to tf32", *machine.current, site);
    }
    const WarpState& warp = meet("mma", 0xffffffffu, mine, sizeof mine, site);
    const auto operand = [&](int lane, int i) {
        float x;
        std::memcpy(&x, warp.given[lane].bytes + 4 * i, sizeof x);
        return double{x};
    };
    const int lane = machine.current->index % WARP_LANES;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
        double sum = double{d[i]};
        for (int k = 0; k < 8; ++k) {
            const double left = operand(row % 8 * 4 + k % 4, (row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0));
            const double right = operand(column * 4 + k % 4, 4 + (k >= 4 ? 1 : 0));
            sum += left * right;
        }
        // Tensor cores truncate.
        float cut = static_cast<float>(sum);
        if (std::isfinite(cut) && std::fabs(double{cut}) > std::fabs(sum)) cut = std::nextafterf(cut, 0.0f);
        d[i] = cut;
    }
}

long long slow_path(const char* name) {
    SlowPath& path = find_slow_path(name);
    return std::exchange(path.count, 0);
}

void run_grid(dim3 grid, int threads, std::size_t shared_bytes, unsigned seed, const std::function<void()>& body) {
#if defined(LARES_EMULATOR_TSAN)
    machine.scheduler_thread = __tsan_get_current_fiber();
#endif
    machine.body = &body;
    machine.threads = dim3(static_cast<unsigned>(threads));
    std::mt19937 random(seed);
    std::vector<unsigned> blocks(grid.x * grid.y);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
    for (const unsigned block : blocks) {
        machine.block = dim3(block % grid.x, block / grid.x, 0);
        // Each block gets fresh heap memory, so that a sanitizer finds accesses beyond it. Its bytes are NaN, so that early
        // reads are found.
        const std::unique_ptr<char, void (*)(void*)> shared(static_cast<char*>(std::malloc(shared_bytes)), &std::free);
        std::memset(shared.get(), 0xff, shared_bytes);
        machine.shared = shared.get();
        run_block(threads, seed ? &random : nullptr);
    }
}

}  // namespace lares_fast::emulator

namespace lares_fast {

void count_slow(const char* name) { ++emulator::find_slow_path(name).count; }

}  // namespace lares_fast
