"""Our linear layers at vLLM's plug-in point, and the benchmark of them, without an engine."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from joinwise.actors.bench import verify
from joinwise.actors.vllm import linears
from joinwise.cluster.errors import ConfigError
from joinwise.kernels import verify_gemm

needs_native = pytest.mark.skipif(not verify_gemm.is_native(), reason="no native kernels on this machine")


def layer_of(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def loaded(weight: torch.Tensor, *, int8: bool = False) -> tuple[linears.LinearMethod, torch.nn.Module]:
    method, layer = linears.LinearMethod(int8), layer_of(weight)
    method.process_weights_after_loading(layer)
    return method, layer


def test_vllm_finds_both_by_name() -> None:
    for name in (linears.AS_IS, linears.INT8):
        assert name in QUANTIZATION_METHODS
        assert get_quantization_config(name)().get_name() == name
    assert get_quantization_config(linears.AS_IS)().get_quant_method(torch.nn.Module(), "") is None


@needs_native
def test_weights_as_they_are_stay_where_they_are() -> None:
    weight, x, bias = torch.randn(30, 40).bfloat16(), torch.randn(3, 40).bfloat16(), torch.randn(30).bfloat16()
    method, layer = loaded(weight)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(method.apply(layer, x, bias), verify_gemm.linear(x, verify_gemm.pack(weight), bias))


@needs_native
def test_int8_lets_go_of_the_weights_it_came_from() -> None:
    weight, x = torch.randn(30, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    method, layer = loaded(weight, int8=True)
    assert layer.weight.numel() == 0
    assert torch.equal(method.apply(layer, x), verify_gemm.linear(x, verify_gemm.pack(weight, int8=True)))


@needs_native
def test_output_embeddings_share_the_input_embeddings_weights() -> None:
    weight, x = torch.randn(64, 40), torch.randn(2, 40)
    method, layer = linears.EmbeddingMethod(), layer_of(weight)
    method.process_weights_after_loading(layer)
    assert torch.equal(method.apply(layer, x), verify_gemm.linear(x, verify_gemm.pack(weight)))
    assert torch.equal(method.embedding(layer, torch.tensor([5])), weight[5:6])


@needs_native
def test_many_rows_are_left_to_torch_with_float32_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[int] = []

    def linear(x: torch.Tensor, packed: verify_gemm.Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ours.append(len(x))
        return torch.zeros(len(x), 30)

    monkeypatch.setattr(verify_gemm, "linear", linear)
    many = linears.MANY_ROWS
    for dtype, int8, wanted in (
        (torch.float32, False, [many - 1]),
        (torch.bfloat16, False, [many - 1, many]),
        (torch.float32, True, [many - 1, many]),
    ):
        ours.clear()
        method, layer = loaded(torch.randn(30, 40).to(dtype), int8=int8)
        for count in (many - 1, many):
            y = method.apply(layer, torch.randn(count, 40).to(dtype))
            assert y.shape == (count, 30)
        assert ours == wanted


@needs_native
def test_a_compiled_model_computes_the_same() -> None:
    method, layer = loaded(torch.randn(30, 40), int8=True)
    x = torch.randn(3, 40)
    compiled = torch.compile(lambda rows: method.apply(layer, rows), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), method.apply(layer, x))


def test_without_native_code_vllm_computes_as_ever_and_int8_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_gemm, "is_native", lambda: False)
    weight, x = torch.randn(30, 40), torch.randn(3, 40)
    method, layer = loaded(weight.clone())
    torch.testing.assert_close(method.apply(layer, x), torch.nn.functional.linear(x, weight))
    with pytest.raises(RuntimeError, match="joinwise_int8: no native kernel here"):
        loaded(weight, int8=True)


def test_other_element_types_are_left_to_vllm() -> None:
    method, layer = loaded(torch.randn(30, 40).half())
    assert not hasattr(layer, linears._PACKED)
    assert method.apply(layer, torch.randn(3, 40).half()).shape == (3, 30)


@needs_native
def test_the_benchmark_measures_every_side_and_weighs_layers() -> None:
    layers = [verify.Layer("small", 64, 96, 3), verify.Layer("other", 96, 64, 1)]
    figures, rows = verify.run(1, lambda _: None, layers, copies_bytes=1 << 15)
    assert len(rows) == 2 * 2 * 3 * len(verify.ROWS)
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in rows)
    assert {f"{side}_{kind}_share_8" for side in ("torch", "vllm", "joinwise") for kind in ("bfloat16", "int8")} <= set(
        figures
    )


def test_figures_weigh_layers_by_the_time_that_a_step_spends_in_them() -> None:
    common = {"side": "x", "weights": "int8", "read_gb_per_s": 1.0}
    rows = [
        common | {"times": 2, "rows": 1, "seconds": 1.0, "share": 0.5},
        common | {"times": 1, "rows": 1, "seconds": 6.0, "share": 1.0},
        common | {"times": 2, "rows": 8, "seconds": 5.0, "share": 0.1},
        common | {"times": 1, "rows": 8, "seconds": 10.0, "share": 0.6},
    ]
    figures = verify.figures(rows)
    assert (figures["x_int8_share_1"], figures["x_int8_share_8"]) == (0.875, 0.35)
    assert (figures["x_int8_cost_1"], figures["x_int8_cost_8"]) == (1.0, 2.5)


def test_the_table_of_the_documentation_has_a_line_for_each_side() -> None:
    write = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "tables.py"))["verify"]
    figures = {"read_gb_per_s": 20.0}
    for place, side in enumerate(("torch", "vllm", "joinwise")):
        for kind in ("bfloat16", "int8"):
            figures |= {
                f"{side}_{kind}_{what}_{rows}": place + rows / 100 for what in ("share", "cost") for rows in verify.ROWS
            }
    lines = list(write(figures, []))
    assert lines.count("| joinwise | 2.01 | 2.04 | 2.08 | 2.16 | 2.32 | 2.04, 2.08, 2.16 |") == 2
    assert "| torch | 0.01 | 0.04 | 0.08 | 0.16 | 0.32 | 0.04, 0.08, 0.16 |" in lines


def test_a_side_that_computes_something_else_is_no_result() -> None:
    with pytest.raises(RuntimeError, match="torch computes another layer"):
        verify._compare(torch.randn(2, 4), {"torch": lambda x: x + 1.0, "joinwise": lambda x: x})


def test_without_native_code_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_gemm, "is_native", lambda: False)
    with pytest.raises(ConfigError, match="nothing to measure"):
        verify.run(1, lambda _: None)
