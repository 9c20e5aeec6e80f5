"""`joinwise bench verify`: linear layers of a few rows, as a share of the bandwidth at which memory can be read.

A decode step reads every weight once; with one row that is all that takes time, and with more it is the least that a
step takes. All sides, and a plain read of as much memory by as many threads, take turns; each pass goes over copies of
a layer that are together several times as large as a usual cache.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from joinwise.actors.vllm import linears
from joinwise.cluster.errors import ConfigError
from joinwise.kernels import verify_gemm
from joinwise.kernels.verify_gemm import Packed, native_calls

ROWS = (1, 4, 8, 16, 32)
_COPIES_BYTES = 96 << 20
Row = dict[str, Any]
Pass = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model."""

    name: str
    channels: int
    inputs: int
    times: float
    """How often a step computes it; the head's channels are a sample of 151,936."""


LAYERS = (
    Layer("qkv", 2048, 1536, 28),
    Layer("o", 1536, 1536, 28),
    Layer("gate_up", 17920, 1536, 28),
    Layer("down", 1536, 8960, 28),
    Layer("head", 16384, 1536, 151936 / 16384),
)
"""Of Qwen2.5-Coder-1.5B."""


def run(
    repeats: int, say: Callable[[str], None], layers: Sequence[Layer] = LAYERS, copies_bytes: int = _COPIES_BYTES
) -> tuple[dict[str, float], list[Row]]:
    """Measure every layer, type of weights, side and number of rows.

    Returns:
        Figures and rows. `share` is of the bandwidth that a plain read had in the same turns.

    Raises:
        ConfigError: there is no native kernel on this machine.
        RuntimeError: a side computes something else.
    """
    if not verify_gemm.is_native():
        raise ConfigError("nothing to measure: the native kernels were not built, or this processor lacks AVX2 or FMA")
    rows: list[Row] = []
    for layer in layers:
        for weights in ("bfloat16", "int8"):
            copies = max(2, copies_bytes // (layer.channels * layer.inputs * (2 if weights == "bfloat16" else 1)))
            sides = _sides(layer, weights, copies)
            for count in ROWS:
                say(f"{layer.name}, {weights}, {count} rows")
                rows += [
                    {"layer": layer.name, "times": layer.times, "weights": weights, "rows": count, "side": side, **row}
                    for side, row in _measure(layer, weights, sides, count, copies, repeats).items()
                ]
    return figures(rows), rows


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of a whole step: shares of bandwidth, and what a step with more rows costs against one with a single row."""
    found = {"read_gb_per_s": statistics.median(row["read_gb_per_s"] for row in rows)}
    kinds = dict.fromkeys((row["side"], row["weights"]) for row in rows)
    for side, weights in kinds:
        spent: dict[int, float] = {}
        for count in dict.fromkeys(row["rows"] for row in rows):
            here = [row for row in rows if (row["side"], row["weights"], row["rows"]) == (side, weights, count)]
            least = sum(row["times"] * row["seconds"] * row["share"] for row in here)
            spent[count] = sum(row["times"] * row["seconds"] for row in here)
            found[f"{side}_{weights}_share_{count}"] = round(least / spent[count], 3)
        first = min(spent)
        found |= {f"{side}_{weights}_cost_{count}": round(spent[count] / spent[first], 2) for count in spent}
    return found


def _sides(layer: Layer, weights: str, copies: int) -> dict[str, list[Pass]]:
    """For each side what computes each copy; they share the weights, where a side does not pack its own."""
    made = [torch.randn(layer.channels, layer.inputs).bfloat16() for _ in range(copies)]
    if weights == "bfloat16":
        return {
            "torch": [partial(_torch, weight) for weight in made],
            "vllm": [linears.stock(weight) for weight in made],
            "joinwise": [partial(_ours, verify_gemm.pack(weight)) for weight in made],
        }
    packed = [verify_gemm.pack(weight, int8=True) for weight in made]
    return {
        "torch": [partial(_torch_int8, each) for each in packed],
        "vllm": [partial(_stock_int8, each)() for each in packed],
        "joinwise": [partial(_ours, each) for each in packed],
    }


def _torch(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def _ours(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return verify_gemm.linear(x, packed)


def _torch_int8(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """Weight-only, as ours is."""
    return torch.ops.aten._weight_int8pack_mm(x, packed.weight, _scale(packed).bfloat16())


def _stock_int8(packed: Packed) -> Pass:
    return linears.stock_int8(packed.weight, _scale(packed), torch.bfloat16)


def _scale(packed: Packed) -> torch.Tensor:
    assert packed.scale is not None, "of int8 weights"
    return packed.scale


def _measure(
    layer: Layer, weights: str, sides: Mapping[str, Sequence[Pass]], count: int, copies: int, repeats: int
) -> dict[str, Row]:
    x = torch.randn(count, layer.inputs).bfloat16()
    away = _compare(x, {side: each[0] for side, each in sides.items()})
    size = copies * layer.channels * layer.inputs * (2 if weights == "bfloat16" else 1)
    memory, threads = torch.ones(size, dtype=torch.uint8), torch.get_num_threads()
    library = native_calls.library()
    assert library is not None, "looked for at the beginning"
    took: dict[str, list[float]] = {side: [] for side in ("read", *sides)}
    for turn in range(repeats + 1):
        spent = {"read": _seconds(lambda: native_calls.read(library, memory, threads))}
        for side, each in sides.items():
            spent[side] = _seconds(lambda each=each: [apply(x) for apply in each])  # type: ignore[misc]
        for side, seconds in spent.items():
            if turn:  # the first touches memory that nobody has touched
                took[side].append(seconds)
    read = statistics.median(took["read"])
    work = 2 * count * layer.channels * layer.inputs * copies
    return {
        side: {
            "seconds": statistics.median(took[side]) / copies,
            "share": statistics.median(base / own for base, own in zip(took["read"], took[side], strict=True)),
            "away": round(away[side], 4),
            "gflops": round(work / statistics.median(took[side]) / 1e9, 1),
            "read_gb_per_s": round(size / read / 1e9, 2),
        }
        for side in sides
    }


def _compare(x: torch.Tensor, sides: Mapping[str, Pass]) -> dict[str, float]:
    """How far each side is from ours, as a share of the results.

    Raises:
        RuntimeError: farther than int8 activations explain.
    """
    wanted = sides["joinwise"](x).float()
    away = {side: float((apply(x).float() - wanted).norm() / wanted.norm()) for side, apply in sides.items()}
    for side, share in away.items():
        if share > 0.15:
            raise RuntimeError(f"{side} computes another layer than joinwise: {share:.0%} away from it")
    return away


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
