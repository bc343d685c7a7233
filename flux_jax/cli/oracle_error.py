"""`python -m flux_jax.nano.oracle_error [--count N] [--seed S]`: the oracle's own error, to be read beside every score.

In: how many pictures of each kind, a seed. Out: the shares of `flux_jax.nano.oracle_calibration`, one JSON object on
stdout.
"""

from collections.abc import Sequence

from flux_jax.cli.main import Parser, guarded, output_json, program, whole
from flux_jax.validation import SEED_LIMIT


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guarded(run, argv)


def run(argv: Sequence[str]) -> None:
    parser = Parser(
        prog=program("nano.oracle_error"), description="Measure the oracle's own error on held-out renders."
    )
    add = parser.add_argument
    add("--count", type=whole(1, 10**6), default=1000, help="pictures of each kind (default: %(default)s)")
    add("--seed", type=whole(0, SEED_LIMIT - 1), default=0)
    add("--size", type=whole(16, 1024), default=128, help="side of the pictures in pixels (default: %(default)s)")
    options = parser.parse_args(argv)
    from flux_jax.nano.oracle_calibration import measure

    output_json(measure(options.count, options.seed, options.size))
