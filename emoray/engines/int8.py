"""An ONNX graph's linear layers in int8, with scales that are measured beforehand: each text's answer is its own.

ONNX Runtime's dynamic quantisation takes its scales from the tensor at hand, so that an answer depends on which texts
share a batch. Here activations have fixed scales, from texts that the graph was run on. Channels that are much larger
than others would cost all of them their precision, so a part of their size moves into the weights first (SmoothQuant,
Xiao et al. 2023, https://arxiv.org/abs/2211.10438). Weights have a scale a column, and 7 bits: processors without VNNI
add up pairs of products in 16 bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from emoray.engines.feeds import Feeds, feed, is_packed
from emoray.tokens import Tokens

MOVED = 0.75
"""How much of a channel's size moves into the weights: SmoothQuant's alpha."""
_WEIGHT_LEVELS = 63
_CONTRIB = "com.microsoft"
Array = NDArray[Any]


def quantize(plain: Path, file: Path, sample: Tokens, pad_id: int) -> None:
    """Write the int8 form of a float32 graph.

    Args:
        sample: texts of the kind that the model will see; a few hundred are enough.
        pad_id: the token that pads batches.
    """
    model = onnx.load(str(plain))
    packed = is_packed(given.name for given in model.graph.input)
    groups = [[sample[i] for i in range(len(sample))[start : start + 16]] for start in range(0, len(sample), 16)]
    batches = [feed(texts, packed, pad_id) for texts in groups]
    weights = {found.name: found for found in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}_{node.op_type}"
    layers: dict[str, list[Any]] = defaultdict(list)  # by what goes in: query, key and value share it
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            layers[node.input[0]].append(node)
    seen = _observe(model, list(layers), batches)
    biases = _biases(model, weights)
    replaced: dict[str, list[Any]] = {}
    for number, (name, nodes) in enumerate(layers.items()):
        matrices = [numpy_helper.to_array(weights[node.input[1]]).astype(np.float32) for node in nodes]
        low, high = seen[name]
        factors = _factors(np.maximum(-low, high), np.stack([np.abs(matrix).max(1) for matrix in matrices]).max(0))
        made = _Layer(model.graph, f"int8_{number}")
        made.input(name, factors, float((low / factors).min()), float((high / factors).max()))
        for node, matrix in zip(nodes, matrices, strict=True):
            bias = biases.get(node.output[0])
            made.product(matrix * factors[:, None], node.output[0] if bias is None else bias.output[0], bias)
            replaced.update({node.name: []} if bias is None else {node.name: [], bias.name: []})
        replaced[nodes[0].name] = made.nodes
    ordered = [new for node in model.graph.node for new in replaced.get(node.name, [node])]
    used = {name for node in ordered for name in node.input}
    kept = [found for found in model.graph.initializer if found.name in used]
    for field, content in ((model.graph.node, ordered), (model.graph.initializer, kept)):
        content = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(content)
    if all(found.domain != _CONTRIB for found in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    onnx.save(model, str(file))


def _biases(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The addition of a constant that follows a product and nothing else does, by the product's output."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    return {
        name: nodes[0]
        for name, nodes in readers.items()
        if len(nodes) == 1 and nodes[0].op_type == "Add" and any(given in weights for given in nodes[0].input)
    }


def _observe(model: Any, names: list[str], batches: Iterable[Feeds]) -> dict[str, tuple[Array, Array]]:
    """Smallest and largest value of each channel, of each tensor."""
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen: dict[str, tuple[Array, Array]] = {}
    for feeds in batches:
        for name, values in zip(names, session.run(names, feeds), strict=True):
            rows = values.reshape(-1, values.shape[-1])
            low, high = rows.min(0), rows.max(0)
            if name in seen:
                low, high = np.minimum(low, seen[name][0]), np.maximum(high, seen[name][1])
            seen[name] = low, high
    return seen


def _factors(activations: Array, weights: Array) -> Array:
    """What each channel is divided by before it is quantised, float32 [channels]; the weights are multiplied by it."""
    factors = np.maximum(activations, 1e-5) ** MOVED / np.maximum(weights, 1e-5) ** (1 - MOVED)
    return np.asarray(np.clip(factors / np.exp(np.log(factors).mean()), 1e-2, 1e2), np.float32)


class _Layer:
    """The nodes that take the place of linear layers with the same input."""

    def __init__(self, graph: Any, name: str) -> None:
        self._graph, self._name = graph, name
        self.nodes: list[Any] = []

    def input(self, source: str, factors: Array, low: float, high: float) -> None:
        """Divide the channels, and round to 8 bits between `low` and `high`."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, 1e-8)
        self._scale = self._constant("scale", np.float32(scale))
        self._zero = self._constant("zero", np.uint8(np.clip(np.rint(-low / scale), 0, 255)))
        if (factors != 1).any():
            source = self._node("Mul", [source, self._constant("even", (1 / factors).astype(np.float32))], "even_out")
        self._rounded = self._node("QuantizeLinear", [source, self._scale, self._zero], "rounded")

    def product(self, matrix: Array, output: str, bias: Any) -> None:
        """The product with a matrix [channels, columns].

        Args:
            bias: the node that adds one to it, if any.
        """
        scales = np.maximum(np.abs(matrix).max(0) / _WEIGHT_LEVELS, 1e-10).astype(np.float32)
        rounded = np.clip(np.rint(matrix / scales), -_WEIGHT_LEVELS, _WEIGHT_LEVELS).astype(np.int8)
        place = len(self.nodes)
        inputs = [self._rounded, self._constant(f"weight_{place}", rounded), self._scale]
        inputs += [self._constant(f"scales_{place}", scales), self._zero]
        if bias is not None:
            constants = {found.name for found in self._graph.initializer}
            inputs += ["", next(name for name in bias.input if name in constants)]
        name = f"{self._name}_product_{place}"
        self.nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], name=name, domain=_CONTRIB))

    def _node(self, kind: str, inputs: list[str], output: str) -> str:
        name = f"{self._name}_{output}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name))
        return name

    def _constant(self, name: str, value: Any) -> str:
        full = f"{self._name}_{name}"
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), full))
        return full
