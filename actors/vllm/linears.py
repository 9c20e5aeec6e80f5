"""Linear layers of engines on CPUs by our own kernel: `engine: {quantization: joinwise}` of a pool.

A method of vLLM's quantization plug-in point. `joinwise` keeps weights as they are, in the memory that they are in;
`joinwise_int8` makes signed bytes of them, with a scale for each output channel, when they have been loaded (output
embeddings stay as they are). Either way a row's result does not depend on the batch that it is in, except in prefills
with float32 weights (`MANY_ROWS`). See `kernels/verify_gemm`; where that has no native code, and for element types that
it does not know, `joinwise` leaves layers to vLLM and `joinwise_int8` refuses.

Results differ from those of vLLM's own layers by rounding, in float32 too: where output has to equal that of a plain
vLLM token for token, both have to use this, or neither.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationMethods, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from joinwise.kernels import verify_gemm

logger = init_logger(__name__)

AS_IS, INT8 = "joinwise", "joinwise_int8"
MANY_ROWS = 64
"""Rows of a step from which torch is faster, with float32 weights; it takes the same memory, so that costs nothing."""
_PACKED = "joinwise_packed"
_TYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("joinwise::linear", mutates_args=())
def _operation(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """What a compiled model calls, which cannot look into the kernel."""
    return _linear(x, verify_gemm.Packed(weight, scale), bias)


@_operation.register_fake
def _shape(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _apply(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed: verify_gemm.Packed = getattr(layer, _PACKED)
    if torch.compiler.is_compiling():
        return _operation(x, packed.weight, packed.scale, bias)
    return _linear(x, packed, bias)


def _linear(x: torch.Tensor, packed: verify_gemm.Packed, bias: torch.Tensor | None) -> torch.Tensor:
    if packed.weight.dtype == torch.float32 and x.numel() >= MANY_ROWS * x.shape[-1]:
        return torch.nn.functional.linear(x, packed.weight, bias)
    return verify_gemm.linear(x, packed, bias)


def _can(layer: torch.nn.Module) -> bool:
    """Whether the kernel serves this layer, and better than what vLLM has."""
    weight = layer.weight
    fits = weight.device.type == "cpu" and weight.dim() == 2 and weight.dtype in _TYPES
    if not fits or not verify_gemm.is_native():
        logger.warning_once("joinwise's linear layers: not for %s on %s here", weight.dtype, weight.device)
        return False
    return True


class LinearMethod(UnquantizedLinearMethod):
    """Of a layer whose weights are loaded as they are."""

    def __init__(self, int8: bool) -> None:
        super().__init__()
        self._int8 = int8

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Raises RuntimeError where int8 was asked for and cannot be."""
        if _can(layer):
            setattr(layer, _PACKED, verify_gemm.pack(layer.weight, int8=self._int8))
            if self._int8:
                layer.weight = torch.nn.Parameter(torch.empty(0, dtype=layer.weight.dtype), requires_grad=False)
        elif self._int8:
            raise RuntimeError(f"{INT8}: no native kernel here for a weight of {layer.weight.dtype}")
        else:
            super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., inputs] to [..., channels]."""
        return _apply(layer, x, bias) if hasattr(layer, _PACKED) else super().apply(layer, x, bias)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """Of input embeddings, and of output embeddings, which may be the same tensor: never int8."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Share the weights with the kernel."""
        if _can(layer):
            setattr(layer, _PACKED, verify_gemm.pack(layer.weight))
        else:
            super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states to logits."""
        return _apply(layer, x, bias) if hasattr(layer, _PACKED) else super().apply(layer, x, bias)


@register_quantization_config(AS_IS)
class LinearsConfig(QuantizationConfig):
    """Every linear layer, and the output embeddings."""

    int8 = False

    def get_name(self) -> QuantizationMethods:
        """What `--quantization` calls it."""
        return INT8 if self.int8 else AS_IS  # type: ignore[return-value] # a literal of the built-in ones

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations."""
        return list(_TYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: none is needed."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing is read beside the model."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LinearsConfig":
        """There is nothing to set."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How this layer computes; None leaves it to vLLM."""
        if isinstance(layer, LinearBase):
            return LinearMethod(self.int8)
        return EmbeddingMethod() if isinstance(layer, VocabParallelEmbedding) else None


@register_quantization_config(INT8)
class Int8LinearsConfig(LinearsConfig):
    """The same with int8 weights in linear layers."""

    int8 = True


def stock(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What vLLM itself computes a layer of [channels, inputs] with on this CPU: what ours is measured against."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def stock_int8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same of int8 weights: oneDNN, which makes int8 of each row of activations as well."""
    handler = _custom_ops.create_onednn_scaled_mm(codes.t(), scale[:, None], dtype, True, False, 32)

    def apply(x: torch.Tensor) -> torch.Tensor:
        rows, row_scale, zero_points = _custom_ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty(len(x), len(codes), dtype=dtype)
        _custom_ops.onednn_scaled_mm(handler, rows, out, row_scale, zero_points, None, None)
        return out

    return apply
