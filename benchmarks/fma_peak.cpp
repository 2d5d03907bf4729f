// Does fused multiply-adds as fast as one core can: twelve independent chains on the widest vectors of this machine.
#if defined(__AVX512F__)
#define FLOATS 16
#else
#define FLOATS 8
#endif
typedef float Vec __attribute__((vector_size(4 * FLOATS)));

// This is assembly, because a compiler could merge chains that compute equal values.
#define CHAIN(a) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(a) : "v"(x), "v"(y))

extern "C" long fma_flops(long rounds) {
    Vec a = {}, b = {}, c = {}, d = {}, e = {}, f = {}, g = {}, h = {}, i = {}, j = {}, k = {}, l = {};
    const Vec x = a + 1e-3f, y = a + 1e-3f;
    for (long round = 0; round < rounds; ++round) {
        CHAIN(a); CHAIN(b); CHAIN(c); CHAIN(d); CHAIN(e); CHAIN(f);
        CHAIN(g); CHAIN(h); CHAIN(i); CHAIN(j); CHAIN(k); CHAIN(l);
    }
    return rounds * 12 * FLOATS * 2;
}
