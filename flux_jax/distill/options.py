"""What a distillation does, as one frozen dataclass; every field is a flag of `python -m flux_jax.distill`.

In: nothing, or words of a command line. Out: `Options`, checked. Pure Python: a wrong flag is answered before JAX is
imported. Two runs with equal options, teacher and prompts give the same student.
"""

import dataclasses
import typing
from typing import Any, Literal

from flux_jax.errors import UserError

PHASES = ("blockwise", "end_to_end")


def option(default: Any, about: str) -> Any:
    """A field with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass(frozen=True)
class Options:
    """See each field's own text. Learning rates of shadows are in codes a step: 1 is the way from code 0 to code 1."""

    phases: str = option("blockwise,end_to_end", "phases to run, in order: blockwise, end_to_end, or both; or none")
    seed: int = option(0, "of the prompts' order, the noise, and the batches")

    trajectories: int = option(3072, "training trajectories; prompts are taken round after round")
    held_out: int = option(64, "trajectories of held-out prompts, on which losses are measured")
    steps: int = option(0, "denoising steps of a trajectory (0: the teacher's default)")
    guidance: float = option(-1.0, "guidance of the trajectories (negative: the teacher's default)")
    height: int = option(0, "pixels of the trajectories (0: the teacher's default)")
    width: int = option(0, "pixels of the trajectories (0: the teacher's default)")
    points: Literal["trajectory", "noise"] = option(
        "trajectory", "train at the teacher's own x_t, or at random noise (known to fail: for the ablation)"
    )

    method: Literal["least-squares", "absmean"] = option("least-squares", "of the first rounding")
    weighted: bool = option(True, "weigh the first rounding of blockwise by the inputs' second moment")
    scales: Literal["channel", "tensor"] = option("channel", "one scale per output channel, or per matrix")
    modulation: bool = option(True, "make the modulation linears ternary, too")
    activations: Literal["bf16", "int8"] = option("bf16", "int8: activations are rounded in training as at run time")
    shadow_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of shadow weights; bfloat16 is updated with stochastic rounding"
    )
    train_rest: bool = option(True, "train what stays floating, too: biases, norms; end to end also the embedders")

    optimizer: Literal["adam", "muon"] = option("adam", "of the shadow weights; everything else has Adam")
    block_steps: int = option(300, "steps for each block of phase blockwise")
    block_points: int = option(8192, "points whose hidden states phase blockwise keeps")
    block_batch: int = option(64, "points of a step")
    block_learning_rate: float = option(1e-2, "of shadow weights")
    learning_steps: int = option(10000, "steps of phase end_to_end")
    settle_steps: int = option(
        3000, "further steps of phase end_to_end, in which codes stay as they are and all floats learn; 0: none"
    )
    own_trajectories: int = option(
        1024,
        "trajectories that the student samples itself, anew at each quarter of phase end_to_end and before it settles:"
        " half of a batch's points are then theirs, and the teacher's velocity there is learned; 0: none",
    )
    batch: int = option(32, "points of a step of phase end_to_end")
    accumulate: int = option(1, "parts that a batch is worked on in, for want of memory")
    learning_rate: float = option(4e-3, "of shadow weights")
    settle_rate: float = option(5e-3, "in place of it in the settling steps, for the two shares that follow")
    scale_rate: float = option(0.3, "learning rate of scales, as a share of the shadows' and of the scale itself")
    rest_rate: float = option(0.1, "learning rate of what stays floating, as a share of the shadows'")
    warmup: float = option(0.02, "first share of a phase's steps, over which learning rates rise")
    decay: float = option(1.0, "last share of a phase's steps, over which they fall to zero")
    decay_power: float = option(
        2.0, "they fall as this power of what is left of it; 1: in a line (a small rate flips few codes)"
    )
    ema: float = option(0.995, "decay of the running mean of the weights, which is what is kept")
    timesteps: Literal["uniform", "step", "error"] = option(
        "uniform",
        "draw a trajectory's points alike, by the length of their Euler step, or by the rounded student's error",
    )
    rematerialise: bool = option(False, "recompute blocks in the backward pass: less memory, a third more time")

    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of activations; auto: bfloat16 on a GPU")
    products: Literal["float32", "bfloat16"] = option(
        "bfloat16", "of the operands of the student's products, where activations are float32"
    )
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(50, "steps between lines of metrics")
    max_skipped: int = option(20, "steps whose loss is not finite, before the run stops")

    @property
    def phase_list(self) -> tuple[str, ...]:
        return tuple(p for p in self.phases.split(",") if p and p != "none")

    @property
    def end_to_end_steps(self) -> int:
        """All steps of phase end_to_end, the settling ones among them."""
        return self.learning_steps + self.settle_steps

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), typing.get_args(hints[field.name])
            if allowed and value not in allowed:
                raise UserError(f"--{field.name.replace('_', '-')} must be {' or '.join(allowed)}, not {value!r}.")
        if unknown := [phase for phase in self.phase_list if phase not in PHASES]:
            raise UserError(f"Unknown phase {unknown[0]!r}: phases are {' and '.join(PHASES)}.")
        if list(self.phase_list) != [phase for phase in PHASES if phase in self.phase_list]:
            raise UserError(f"--phases must name each phase once and in order: {','.join(PHASES)}.")
        least = dict.fromkeys(("trajectories", "held_out", "block_points", "block_batch", "batch", "accumulate"), 1)
        least |= dict.fromkeys(("save_every", "log_every", "block_steps", "learning_steps"), 1)
        least |= dict.fromkeys(("seed", "steps", "height", "width", "max_skipped", "ema", "decay_power"), 0)
        least |= dict.fromkeys(("own_trajectories", "settle_steps"), 0)
        least |= dict.fromkeys(("learning_rate", "block_learning_rate", "settle_rate", "scale_rate", "rest_rate"), 0)
        most = {"warmup": 1, "decay": 1, "ema": 1, "seed": 2**32 - 1}
        for name in least.keys() | most.keys():
            low, high = least.get(name, 0), most.get(name, float("inf"))
            if not low <= getattr(self, name) <= high:
                between = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
                raise UserError(f"--{name.replace('_', '-')} must be {between}, not {getattr(self, name)}.")
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} cannot be split into --accumulate {self.accumulate} equal parts.")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


QUICK: dict[str, Any] = {  # what --quick sets where no flag says otherwise: FLUX-nano in minutes on two cores
    "trajectories": 256,
    "held_out": 16,
    "block_steps": 40,
    "block_points": 1024,
    "block_batch": 32,
    "learning_steps": 260,
    "settle_steps": 60,
    "own_trajectories": 0,
    "batch": 32,
    "learning_rate": 6e-3,
    "decay": 0.5,  # so few steps need a high rate for longer
    "decay_power": 1.0,
    "ema": 0.97,
    "save_every": 150,
    "log_every": 20,
}

LARGE: dict[str, Any] = {  # what --large sets where no flag says otherwise: FLUX.1-dev in half a day of an H100's time
    "trajectories": 1024,
    "held_out": 16,
    "block_steps": 1000,
    "block_points": 1024,
    "block_batch": 16,
    "learning_steps": 1600,
    "settle_steps": 400,
    "own_trajectories": 128,
    "batch": 16,
    "rematerialise": True,
}
