"""The parts of the reliability tests, and what each part does."""

# A part is a module of this folder with a function ``measure(counts)``. ``counts.quick`` asks for a short form.
PARTS: dict[str, str] = {
    "kill": "kills and interrupts runs, fills disks, takes away rights, and resumes",
    "corrupt": "damages, swaps and takes away the files of a run, and damages parquet logs",
    "diverge": "makes runs diverge, and changes settings and software between two parts of a run",
    "fuzz_ops": "calls the ops, the model and the recommender with random arguments, valid and not valid",
    "fuzz_readers": "reads mutated logs, settings and lists of ids, strange paths, and files that change",
    "fuzz_native": "calls the native code with random bytes under sanitizers, and with hostile arguments",
    "threads": "calls the native code from several threads, after forks, under limits and during signals",
    "memory": "compares predicted and measured peak memory",
    "soak": "trains, evaluates and recommends for two hours and watches the memory",
    "numerics": "calls every op with very large, very small, subnormal and non-finite numbers, and with no rows",
    "hosts": "imports, trains and calls the ops on other processors and with other versions of Python, torch and NumPy",
    "security": "attacks outputs, the cache, settings and input paths, and checks the protection of the native module",
}
