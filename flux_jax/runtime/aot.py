"""Programs compiled for a GPU that is not there: how much memory they will take, and the code they will run.

In: the name of a GPU ("h100", "h200", "a100", "a10", "l20", "rtx4090"), a jitted function, and its arguments with
shapes for arrays. Out: the compiled program: `memory_analysis()` of the very program that would run there, its text,
and where asked its PTX. Needs no GPU, but the CUDA plugin of JAX (the extra `aot`). What is traced here asks
`pallas_kernels.current_target()` where it will run, as attention and ternary products do, never the host.

XLA chooses default tiles for its own matrix products when it cannot try them: never read speed from such a program.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

import pallas_kernels
from flux_jax.errors import UserError, pip_install

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"  # the plugin otherwise refuses to start without a driver


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all GPUs of a compute capability share. Source: CUDA C++ Programming Guide, "Compute Capabilities"."""

    compute_capability: tuple[int, int]
    threads_per_core: int
    fpus_per_core: int
    shared_memory_per_core: int  # bytes
    shared_memory_per_block: int  # bytes, at most
    accelerated: bool = False  # has instructions that no other architecture has (wgmma): sm_90a

    @property
    def name(self) -> str:
        """As ptxas calls it, "sm_90a"."""
        return "sm_{}{}".format(*self.compute_capability) + "a" * self.accelerated


AMPERE = Architecture((8, 0), 2048, 64, 167_936, 166_912)
AMPERE_86 = Architecture((8, 6), 1536, 128, 102_400, 101_376)
ADA = Architecture((8, 9), 1536, 128, 102_400, 101_376)
HOPPER = Architecture((9, 0), 2048, 128, 233_472, 232_448, accelerated=True)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU in numbers. Sources: the vendor's datasheets; memory as the driver reports it."""

    kind: str  # as `jax.Device.device_kind` says it
    architecture: Architecture
    multiprocessors: int
    memory_bytes: int
    bytes_per_second: float  # of memory
    l2_bytes: int
    gigahertz: float

    def description(self) -> str:
        """The device as XLA's compiler wants it: `stream_executor.GpuTargetConfigProto` in text form."""
        arch, (major, minor) = self.architecture, self.architecture.compute_capability
        feature = "ACCELERATED_FEATURES" if arch.accelerated else "NONE"
        return f"""
gpu_device_info {{
  name: "{self.kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{"a" * arch.accelerated}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  core_count: {self.multiprocessors}
  fpus_per_core: {arch.fpus_per_core}
  threads_per_core_limit: {arch.threads_per_core}
  shared_memory_per_core: {arch.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {arch.shared_memory_per_block}
  device_memory_size: {self.memory_bytes}
  memory_bandwidth: {int(self.bytes_per_second)}
  l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.gigahertz}
  ecc_enabled: true
  threads_per_warp: 32
  threads_per_block_limit: 1024
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.kind}"
"""


MIB = 2**20
GPUS = {
    "a10": Gpu("NVIDIA A10", AMPERE_86, 72, 23_836_164_096, 600e9, 6 * MIB, 1.695),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", AMPERE, 108, 84_987_740_160, 2039e9, 40 * MIB, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", HOPPER, 132, 84_942_979_072, 3352e9, 50 * MIB, 1.98),
    "h200": Gpu("NVIDIA H200", HOPPER, 132, 151_397_597_184, 4800e9, 50 * MIB, 1.98),
    "l20": Gpu("NVIDIA L20", ADA, 92, 47_810_936_832, 864e9, 96 * MIB, 2.52),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", ADA, 128, 25_386_352_640, 1008e9, 72 * MIB, 2.52),
}

# Pallas lowers a kernel for a GPU that is not there only where JAX knows its name: another of the same architecture.
KNOWN_TO_PALLAS = {"NVIDIA L20": "NVIDIA L4"}


def target(name: str) -> Gpu:
    """The GPU of that name (in any case). UserError if it is not described here."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise UserError(f"no GPU {name!r} is described: choose one of {', '.join(GPUS)}") from None


def mesh(name: str, shape: Sequence[int] = (1,), axes: Sequence[str] = ("device",)) -> Mesh:
    """Devices of that kind which are not there, on axes of the names given.

    UserError where JAX has no CUDA plugin, or has started already in a way that shut the plugin out.
    """
    if not any(map(importlib.util.find_spec, PLUGINS)):
        raise UserError(f"compiling for a GPU that is not there needs JAX's CUDA plugin: {pip_install('aot')}")
    from jax.experimental import topologies

    os.environ.setdefault(SKIP_CHECK, "1")  # no effect where JAX has started
    layout = f"1x1x{math.prod(shape)}"
    description = target(name).description()
    try:
        found = topologies.get_topology_desc(layout, platform="cuda", target_config=description, topology=layout)
    except NotImplementedError:
        raise UserError(
            f"JAX started without its CUDA plugin, which found no driver: set {SKIP_CHECK}=1 before JAX starts"
        ) from None
    grid = np.array(found.devices).reshape(shape)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


@contextlib.contextmanager
def compiling_for(devices: Mesh) -> Iterator[None]:
    """Functions traced and lowered inside are meant for those devices: `pallas_kernels.current_target()` says so."""
    first = devices.devices.flat[0]
    known_as = KNOWN_TO_PALLAS.get(first.device_kind, first.device_kind)
    abstract = AbstractMesh(
        devices.axis_sizes,
        devices.axis_names,
        devices.axis_types,
        abstract_device=AbstractDevice(known_as, first.core_count, first.platform),
    )
    # JAX keeps a function's trace apart for each mesh around it: what was traced for another device is not used again.
    with (
        jax.sharding.use_abstract_mesh(abstract),
        pallas_kernels.compiling_for(
            pallas_kernels.Target(first.platform, first.compute_capability, first.device_kind)
        ),
    ):
        yield


def compile_for(
    gpu: str | Mesh,
    function: Any,
    *args: Any,
    dump: Path | None = None,
    compiler_options: dict[str, Any] | None = None,
    **static: Any,
) -> Any:
    """`function`, made by jax.jit, compiled for one GPU of that name, or for a `mesh` of them.

    args: pytrees (NNX modules too) whose leaves have shape and dtype, such as arrays or `jax.ShapeDtypeStruct`. A leaf
    with a sharding over the mesh keeps it, every other one is on all devices. static: the static arguments, by name.
    dump: a folder for all that XLA writes about the program; its PTX is there as *.ptx. Returns `jax.stages.Compiled`.
    """
    devices = mesh(gpu) if isinstance(gpu, str) else gpu
    everywhere = NamedSharding(devices, PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        own = getattr(leaf, "sharding", None)
        sharding = own if isinstance(own, Sharding) and own.device_set <= everywhere.device_set else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    options = dict(compiler_options or {})
    if dump is not None:
        options["xla_dump_to"] = str(dump)
        if jax.__version_info__ >= (0, 11):
            options["xla_dump_emitter_re"] = "ptx"  # it is written since then only where this matches; all: minutes
    with compiling_for(devices):
        lowered = function.lower(*jax.tree.map(place, args), **static)
    return lowered.compile(compiler_options=options)
