"""Programs that stand in for a toolkit and a driver."""

ONE_GPU = "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'"


def program(folder, name, script):
    """Write a shell script ``name`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def nvidia_smi(folder, script):
    """Write an nvidia-smi that answers ``-L`` by ``script``, and nothing else."""
    program(folder, "nvidia-smi", f'[ "$*" = -L ] || exit 99\n{script}')


def broken(folder):
    """Return a folder with an nvcc that fails."""
    program(folder / "broken", "nvcc", "echo 'nvcc: this toolkit is damaged' >&2\nexit 1")
    return folder / "broken"
