"""The memory that each stage of a picture takes on a device, before anything is loaded.

In: a model's configuration and form, a size, and a device: the one that is present, or a name of
`flux_jax.runtime.aot`. Out: for each stage its weights, those of other components that lie on the device meanwhile, and
the memory of its program, as XLA compiled it for that device; whether it fits, and if not, the arguments that make it.
Pictures are drawn one at a time: a batch takes no more. Not counted: what the driver keeps for itself.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import FluxConfig
from flux_jax.models.params import COMPONENTS, abstract_component, nbytes
from flux_jax.models.quantize import abstract_ternary
from flux_jax.models.vae_tiling import STRIP_BYTES
from flux_jax.runtime import aot, memory
from flux_jax.sampling import offload, programs

GIGABYTE = 1e9
STAGE_COMPONENTS = {"text": ("t5", "clip"), "denoise": ("transformer",), "decode": ("vae",)}
# What is tried, in this order, for a model that does not fit: the first that does costs the least time.
REMEDIES = (("none", "on"), ("model", "off"), ("model", "on"), ("layers", "off"), ("layers", "on"))


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes on the device while a stage works: its own weights, other components' that wait there, and its
    program's."""

    name: str
    weights: int
    waiting: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.waiting + self.temporaries


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model's shapes. activations: of its ternary layers, "bf16" or "int8"; None: it has none."""

    config: FluxConfig
    activations: str | None
    dtype: Any

    @functools.cache  # noqa: B019 - a few models in the life of a process
    def component(self, name: str) -> Any:
        """A component with shapes for arrays."""
        if name == "transformer" and self.activations is not None:
            return abstract_ternary(self.config, self.dtype, activations=self.activations)
        return abstract_component(name, self.config, self.dtype)


class Planner:
    """The programs of a picture, compiled for a device as they are asked for. gpu: a name of `flux_jax.runtime.aot`, or
    None for JAX's own device; height and width in pixels."""

    def __init__(self, model: AbstractModel, gpu: str | None, *, height: int, width: int, steps: int, length: int):
        self.model, self.gpu, self.steps, self.length = model, gpu, steps, length
        self.rows, self.columns = (edge // model.config.pixels_per_token for edge in (height, width))
        if gpu is None:
            device = jax.local_devices()[0]
            self.device, self.capacity = device.device_kind, memory.capacity(device)
        else:
            target = aot.target(gpu)
            self.device, self.capacity = target.kind, int(memory.FRACTION * target.memory_bytes)

    def stages(self, offloading: str = "none", vae_tiling: str = "off") -> list[StageMemory]:
        """Each stage's bytes, with the pipeline's two arguments for less memory."""
        size = {component: nbytes(self.model.component(component)) for component in COMPONENTS}
        layers = offloading == "layers"
        needed = {
            "text": self.layer() if layers else self.text(),
            "denoise": self.denoise(),
            "decode": self.decode(STRIP_BYTES if vae_tiling == "on" else None),
        }
        found = []
        for name, components in STAGE_COMPONENTS.items():
            own = sum(size[component] for component in components)
            waiting = 0 if offloading != "none" else sum(size.values()) - own
            if name == "text" and layers:
                own = max(nbytes(self.model.component("t5").layers) // self.model.config.t5.num_layers, size["clip"])
            found.append(StageMemory(name, own, waiting, needed[name]))
        return found

    def fits(self, stages: Sequence[StageMemory]) -> bool:
        return self.capacity is None or all(stage.total <= self.capacity for stage in stages)

    def remedy(self) -> str | None:
        """The pipeline's arguments that make the model fit, the cheapest that do; None where none does."""
        for offloading, vae_tiling in REMEDIES:
            if self.fits(self.stages(offloading, vae_tiling)):
                arguments = [] if offloading == "none" else [f'offload="{offloading}"']
                return " ".join(arguments + (['vae_tiling="on"'] if vae_tiling == "on" else []))
        return None

    def last_resort(self) -> str:
        """What helps a model that no argument for one device makes fit."""
        smaller = "choose a smaller size"
        if self.model.activations is None:
            smaller = "choose a ternary checkpoint"
        return f"{smaller}, or split the transformer over several devices, with a mesh of model=N"

    @functools.cache  # noqa: B019 - a planner lives as long as its answers are wanted
    def text(self) -> int:
        """Bytes of the program that encodes a prompt, beside the weights."""
        clip = self.array(1, self.model.config.clip.max_positions, dtype=jnp.int32)
        ids = self.array(1, self.length, dtype=jnp.int32)
        return self.program(programs.encode, self.model.component("t5"), self.model.component("clip"), ids, clip)

    @functools.cache  # noqa: B019
    def layer(self) -> int:
        """The same for one layer of T5."""
        config, dtype = self.model.config.t5, self.model.dtype
        layers = self.model.component("t5").layers
        layer = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layers)
        x = self.array(1, self.length, config.d_model, dtype=dtype)
        return self.program(offload.layer, layer, x, self.array(1, config.num_heads, self.length, self.length))

    @functools.cache  # noqa: B019
    def denoise(self) -> int:
        """The same for all steps."""
        config, tokens = self.model.config.transformer, self.rows * self.columns
        inputs = programs.abstract_inputs(config, self.steps, tokens, self.length, self.model.dtype)
        return self.program(programs.denoise, self.model.component("transformer"), *inputs)

    @functools.cache  # noqa: B019
    def decode(self, strip_bytes: int | None) -> int:
        """The same for decoding, whole or in strips."""
        x = self.array(self.rows * self.columns, self.model.config.transformer.in_channels)
        sizes = {"rows": self.rows, "columns": self.columns, "strip_bytes": strip_bytes}
        return self.program(programs.decode, self.model.component("vae"), x, **sizes)

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def program(self, function: Any, *args: Any, **static: Any) -> int:
        """Bytes that a program takes beside the modules among its arguments."""
        if self.gpu is None:
            compiled = function.lower(*args, **static).compile()
        else:
            compiled = aot.compile_for(self.gpu, function, *args, **static)
        found = compiled.memory_analysis()
        arrays = sum(nbytes(arg) for arg in args if isinstance(arg, (jax.ShapeDtypeStruct, programs.Conditions)))
        return arrays + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def describe(planner: Planner, offloading: str, vae_tiling: str) -> tuple[str, dict[str, Any]]:
    """The plan in words, and as numbers. vae_tiling "auto" is what `flux_jax.generate` would decide."""
    stages = planner.stages(offloading, "on" if vae_tiling == "on" else "off")
    if vae_tiling == "auto" and planner.capacity is not None and stages[-1].total > planner.capacity:
        stages, vae_tiling = planner.stages(offloading, "on"), "on"
    fits = planner.fits(stages)
    capacity = "unknown" if planner.capacity is None else f"{planner.capacity / GIGABYTE:.2f} GB"
    lines = [f"{planner.device}: {capacity} for programs", "GB          weights   others  program    total"]
    for stage in stages:
        figures = (stage.weights, stage.waiting, stage.temporaries, stage.total)
        lines.append(f"{stage.name:10}" + "".join(f"{figure / GIGABYTE:9.3f}" for figure in figures))
    remedy = None if fits else planner.remedy()
    if fits:
        lines.append(f"It fits: {max(stage.total for stage in stages) / GIGABYTE:.2f} GB at most.")
    elif remedy:
        lines.append(f"It does not fit; it does with {remedy}.")
    else:
        lines.append(f"It does not fit, and nothing makes it on one device; {planner.last_resort()}.")
    rows = [dataclasses.asdict(stage) | {"total": stage.total} for stage in stages]
    return "\n".join(lines), {
        "device": planner.device,
        "capacity_bytes": planner.capacity,
        "offload": offloading,
        "vae_tiling": vae_tiling,
        "stages": rows,
        "fits": fits,
        "remedy": remedy,
    }


def model_of(stored: Checkpoint, dtype: Any) -> AbstractModel:
    """The shapes of a checkpoint, as they would be loaded."""
    quantization = stored.manifest["quantization"]
    return AbstractModel(stored.config, None if quantization is None else quantization["activations"], jnp.dtype(dtype))
