"""Eight devices of a kind that this machine need not have, to compile for.

The compilers come in packages: ``pip install 'lrjax[accelerators]'``. They need no
hardware, no driver and no CUDA.
"""

import importlib.util
import os
from importlib.metadata import version

import jax
from jax.experimental import topologies


# For each kind of device the modules and the package of its compiler.
COMPILERS = {
    "v5e": ("libtpu", "libtpu"),
    "h100": ("jax_plugins.xla_cuda12", "jax-cuda12-pjrt"),
}
# What XLA has to know of an H100 SXM, in its own format; the published figures of the chip.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
}
"""


def missing(target: str) -> str | None:
    """Why nothing can be compiled for a kind of device, or ``None`` if it can."""
    module, package = COMPILERS[target]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found:
        return None
    return f"no compiler for {target}: pip install 'lrjax[accelerators]' brings {package}"


def versions(target: str) -> dict[str, str]:
    """What decides the program that comes out: the versions of jax and the compiler."""
    package = COMPILERS[target][1]
    return {"jax": version("jax"), package: version(package)}


def devices(target: str) -> list[jax.Device]:
    """Eight devices to compile for. Nothing runs on them.

    Call it before anything else touches jax: the platforms of this process are set to CPU.
    """
    jax.config.update("jax_platforms", "cpu")
    if target == "v5e":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask about itself
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    return topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x8"
    ).devices
