# The environment that every lane uses. The file .ci/run defines the variable `scratch` and the function `step`.
# shellcheck shell=bash disable=SC2154

# prepare LANE...: install what these lanes need.
prepare() {
    echo "torch==2.13.0" > "$scratch/constraints.txt"
    export PIP_CONSTRAINT="$scratch/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
    export VIRTUAL_ENV="$scratch/venv" PATH="$scratch/venv/bin:$PATH"
    # Several lanes compile the same C++ sources, each in a folder of its own. The cache is empty at the start. Objects are
    # shared between folders, because paths below CCACHE_BASEDIR are hashed relative to the build folder. The absolute path
    # of the program serves a test whose PATH has no ccache.
    export CMAKE_CXX_COMPILER_LAUNCHER=/usr/bin/ccache CCACHE_DIR="$scratch/ccache" CCACHE_BASEDIR="$PWD"
    step "environment" make_environment "$@"
    step "package" pip install -q ".[train]"
    # The demo must run with the extra `train` alone, so it runs before the test tools are installed.
    if [[ " $* " = *" demo "* ]]; then step "demo" lane_demo; fi
    step "test tools" pip install -q ".[dev,bench,docs]" cmake ninja pybind11 nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
}

# System packages and torch, downloaded at the same time.
make_environment() {
    local packages=(g++ ccache) apt
    if [[ " $* " = *" native "* ]]; then packages+=(libsimde-dev g++-aarch64-linux-gnu qemu-user); fi
    install_system_packages "${packages[@]}" > "$scratch/logs/apt.txt" 2>&1 &
    apt=$!
    python3 -m venv "$VIRTUAL_ENV"
    pip install -q torch==2.13.0
    wait "$apt" || { cat "$scratch/logs/apt.txt"; exit 1; }
}

install_system_packages() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" apt-get install -y -qq "$@"
}

lane_demo() {
    lares-fast doctor
    lares-fast demo --out "$scratch/demo"
    local file
    for file in config.yaml metrics.csv events.jsonl steps-spt.csv steps-rpt.csv results.svg report.html model.safetensors state.pt; do
        test -s "$scratch/demo/$file"
    done
}
