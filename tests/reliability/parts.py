"""The parts of the reliability tests, and what each part does."""

# A part is a module of this folder with a function ``measure(counts)``. ``counts.quick`` asks for a short form.
PARTS: dict[str, str] = {
    "kill": "kills and interrupts runs, fills disks, takes away rights, and resumes",
    "corrupt": "damages the files of a run, and input files",
    "diverge": "makes runs diverge, and changes settings and software between two parts of a run",
    "fuzz_ops": "calls the ops, the model and the recommender with random arguments, valid and not valid",
    "fuzz_readers": "reads mutated logs, settings and lists of ids, strange paths, and files that change",
    "fuzz_native": "calls the native code with random bytes, under sanitizers",
    "threads": "calls the native code from several threads, and after forks",
    "memory": "compares predicted and measured peak memory",
    "soak": "trains, evaluates and recommends for two hours and watches the memory",
    "numerics": "computes with very large, very small and non-finite numbers",
    "hosts": "tests other processors and other versions of torch and NumPy",
    "security": "attacks outputs, caches and settings from a second account's view",
}
