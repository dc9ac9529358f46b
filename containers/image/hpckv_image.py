"""Imported at every start of Python in the image, whatever container runtime started it: settings that an image needs.

Variables and no more. What the user or a batch script has set stands.
"""

import os
import stat

SETTINGS = {
    # Compute nodes have no internet; looking for it takes minutes.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Every rank has a container, and a user namespace, of its own: the kernel then lets none read another's memory or open its
    # files, which MPICH and UCX would do on one node. Messages go through shared memory instead.
    "MPIR_CVAR_CH4_CMA_ENABLE": "0",
    "UCX_POSIX_USE_PROC_LINK": "n",
}
CACHES = {
    "XDG_CACHE_HOME": "",
    "HF_HOME": "huggingface",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
"""Would be in $HOME, and go to the node's own disk."""


def cache_folder() -> str | None:
    """One that is the user's alone: compiled kernels lie there, so one that somebody else made is not used."""
    roots = [root for name in ("SLURM_TMPDIR", "TMPDIR") if (root := os.environ.get(name))]
    for root in (*roots, "/tmp"):  # the job's own folder may not be bound into the container
        place = os.path.join(root, f"hpckv-cache-{os.getuid()}")
        try:
            if not os.path.lexists(place):
                os.mkdir(place, 0o700)  # noqa: PTH102 - pathlib would cost every start of Python its import
            found = os.lstat(place)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return place
    return None


def set_variables() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    unset = [name for name in CACHES if name not in os.environ]
    place = cache_folder() if unset else None
    if place is not None:
        os.environ.update({name: os.path.join(place, CACHES[name]).rstrip("/") for name in unset})


set_variables()
