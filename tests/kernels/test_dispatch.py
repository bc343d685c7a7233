"""Which backend and tiles a product gets: by device, shape and operand; tables of measured settings."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    LAYOUT_VERSION,
    Target,
    compiling_for,
    pack_ternary,
    packed_width,
    supported,
    ternary_matmul,
    tiling,
)
from pallas_kernels import dispatch as s

CPU, T4 = Target("cpu"), Target("gpu", "7.5", "Tesla T4")
A100, A10, H100 = (
    Target("gpu", c, n) for c, n in [("8.0", "NVIDIA A100"), ("8.6", "NVIDIA A10"), ("9.0", "NVIDIA H100")]
)
SHARED_MEMORY = {"8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227}  # KiB a block may have, from NVIDIA's programming guide
ITEMSIZE = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
FLUX = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072), (21504, 3072), (3072, 15360)]
TILE = tiling.TileConfig(64, 64, 128, 4, 2)
ROW = {"operand": "int8", "m": 512, "n": 3072, "k": 3072, "settings": dataclasses.asdict(TILE)}
NANO = [(384, 128), (128, 128), (512, 128), (128, 512), (768, 128), (896, 128), (128, 640)]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder in place of the measured tables."""
    monkeypatch.setattr(tiling, "TABLES", tmp_path)
    tiling.read_table.cache_clear()
    yield tmp_path
    tiling.read_table.cache_clear()


@pytest.mark.parametrize(
    ("target", "ok"),
    [
        *[(target, False) for target in (CPU, Target("tpu"), Target("gpu", ""), T4)],
        *[(target, True) for target in (A100, A10, H100, Target("cuda", "12.0"), Target("interpret", "9.0"))],
    ],
    ids=str,
)
def test_triton_is_supported_from_compute_capability_8_up(target, ok):
    assert supported("xla", target) == (True, "")
    answer, reason = supported("triton", target)
    assert answer is ok and bool(reason) is not ok


@pytest.mark.parametrize("target", [CPU, T4], ids=str)
def test_an_unsupported_backend_is_refused_by_name_and_replaced_otherwise(target, capfd, snapshot_message):
    s._say.cache_clear()
    with snapshot_message.raises(ValueError, "'triton'", target.compute_capability):
        s.choose_implementation("triton", target, 64, "int8")
    for _ in range(2):
        assert (
            s.choose_implementation(None, target, 64, "int8")
            == s.choose_implementation("xla", target, 64, "int8")
            == "xla"
        )
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "XLA" in err


@pytest.mark.parametrize(
    ("m", "operand", "backend"),
    [
        (4608, "int8", "triton"),
        (1, "int8", "triton"),
        (1, "bfloat16", "triton"),
        (4608, "bfloat16", "xla"),
        (1, "float32", "xla"),
    ],
)
def test_none_takes_the_kernel_where_it_pays(m, operand, backend):
    assert s.choose_implementation(None, H100, m, operand) == backend
    assert s.choose_implementation("triton", H100, m, operand) == "triton"


def test_the_line_is_printed_once_a_process_and_triton_is_not_imported():
    program = """
import sys, jax.numpy as jnp, numpy as np
from pallas_kernels import pack_ternary, ternary_matmul
packed = pack_ternary(np.ones((8, 128), np.int8))
for _ in range(2):
    ternary_matmul(jnp.ones((2, 128)), packed, jnp.ones(8))
assert "jax.experimental.pallas" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.count("pallas_kernels:") == 1


def test_a_product_is_traced_for_the_target_that_is_told(snapshot_message):
    arguments = jnp.ones((2, 128)), pack_ternary(np.ones((8, 128), np.int8)), jnp.ones(8)
    with snapshot_message.raises(ValueError, "8.0", "Tesla T4"), compiling_for(T4):
        ternary_matmul(*arguments, implementation="triton")
    with compiling_for(Target("interpret", "9.0")):
        assert s.current_target().platform == "interpret"
    assert s.current_target().platform != "interpret"


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("operand", ITEMSIZE)
@pytest.mark.parametrize("epilogue", tiling.EPILOGUES)
def test_heuristic_settings_fit_the_device(capability, operand, epilogue):
    for n, k in FLUX + NANO:
        for m in (1, 16, 17, 77, 512, 1024, 4608):
            settings = tiling.heuristic_tiles(Target("gpu", capability), m, n, k, operand, epilogue)
            x = settings.block_m * settings.block_k * ITEMSIZE[operand]
            w = settings.block_n * settings.block_k // 4
            # The load pipeline's buffers; Hopper's asynchronous products hold x for one stage more.
            held = x * (settings.num_stages - (capability < "9")) + w * (settings.num_stages - 1)
            assert held <= SHARED_MEMORY[capability] * 1024, (m, n, k, settings)
            assert 4 * packed_width(k) % settings.block_k == 0, "a step would end in the middle"
            assert settings.block_m <= max(32, 2 * m), "tokens would be mostly padding"


def test_measured_settings_are_used_for_their_shape_and_near_it(tables):
    measured = [tiling.TileConfig(64, 64, 128, 4, 2), tiling.TileConfig(128, 64, 128, 4, 2)]
    rows = [
        {**ROW, "epilogue": "gelu", "m": m, "settings": dataclasses.asdict(settings)}
        for m, settings in zip((512, 4608), measured, strict=True)
    ]
    tiling.table_path("NVIDIA H100").write_text(
        json.dumps({"device": "NVIDIA H100", "layout": LAYOUT_VERSION, "rows": rows})
    )
    assert [p.name for p in tables.iterdir()] == ["nvidia_h100.json"]
    for m, expected in [
        (512, measured[0]),
        (300, measured[0]),
        (1000, measured[0]),
        (2400, measured[1]),
        (4608, measured[1]),
    ]:
        assert tiling.choose_tiles(H100, m, 3072, 3072, "int8", "gelu") == expected
    for other in [
        (250, 3072, 3072, "int8", "gelu"),
        (9300, 3072, 3072, "int8", "gelu"),
        (512, 3072, 12288, "int8", "gelu"),
        (512, 3072, 3072, "bfloat16", "gelu"),
        (512, 3072, 3072, "int8", "none"),
    ]:
        assert tiling.choose_tiles(H100, *other) == tiling.heuristic_tiles(H100, *other)
    own = 512, 3072, 3072, "int8", "gelu"
    assert tiling.choose_tiles(A10, *own) == tiling.heuristic_tiles(A10, *own)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "nvidia_h100.json is no table of measured settings"),
        ('{"rows": []}', "nvidia_h100.json is no table"),
        ('{"rows": [{"settings": {"block_m": 3}}]}', "nvidia_h100.json is no table"),
        (json.dumps({"rows": [ROW]}), "nvidia_h100.json is no table of measured settings"),
        ('{"layout": 99, "rows": []}', "layout 99"),
    ],
)
def test_a_damaged_or_outdated_table_is_an_error(tables, text, named, snapshot_message):
    tiling.table_path("NVIDIA H100").write_text(text)
    with snapshot_message.raises(ValueError, named):
        tiling.choose_tiles(H100, 512, 3072, 3072, "int8")


def test_tables_in_the_package_are_readable():
    for path in tiling.TABLES.glob("*.json"):
        assert tiling.read_table(path) and tiling.table_path(json.loads(path.read_text())["device"]) == path


@pytest.mark.parametrize(
    "fields",
    [
        (8, 64, 128, 4, 2),
        (64, 48, 128, 4, 2),
        (64, 64, 64, 4, 2),
        (64, 64, 128, 3, 2),
        (64, 64, 128, 32, 2),
        (64, 64, 128, 4, 0),
    ],
)
def test_settings_that_no_kernel_can_have_are_refused(fields, snapshot_message):
    with snapshot_message.raises(ValueError, "expected"):
        tiling.TileConfig(*fields)
