"""Join the exported parts of a detector into one ONNX graph, in which a Loop applies f.

The number of steps is an input, and each weight is stored once. torch.onnx cannot export a loop whose body is a module,
so the parts are exported one by one and joined here.
"""

import math

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

CARRIED = ("state", "boxes", "scores", "residual")  # the loop-carried values


def join_loop(encoder: ModelProto, body: ModelProto, best: ModelProto, steps: int) -> ModelProto:
    """Join encoder, loop and read-out.

    Args:
        encoder: images, sizes -> state, boxes, scores, level0, ... (see graphs.Encoder).
        body: state, boxes, scores, level0, ... -> state, boxes, scores, residual (see graphs.LoopBody).
        best: boxes, scores -> boxes, scores, classes (see graphs.Best).
        steps: the default of the input "steps", () int64.

    Returns:
        images, sizes, steps -> boxes, scores, classes, residual.
    """
    encoder, body, best = (
        onnx.compose.add_prefix(model, f"{name}/") for name, model in (("g", encoder), ("f", body), ("best", best))
    )
    levels = [x.name.removeprefix("g/") for x in encoder.graph.output if x.name.startswith("g/level")]
    inputs = [_renamed(x, x.name.removeprefix("g/")) for x in encoder.graph.input]
    outputs = [_renamed(x, x.name.removeprefix("best/").removesuffix(".out")) for x in best.graph.output]
    residual = next(x for x in body.graph.output if x.name == f"f/{CARRIED[-1]}.out")
    outputs.append(_renamed(residual, CARRIED[-1]))
    no_step_yet = helper.make_tensor("value", TensorProto.FLOAT, [1], [math.inf])
    nodes = [
        *(helper.make_node("Identity", [x.name], [f"g/{x.name}"]) for x in inputs),
        *encoder.graph.node,
        # The body of a Loop can read values of the enclosing graph, so the levels need not be loop-carried.
        *(helper.make_node("Identity", [f"g/{level}"], [f"f/{level}"]) for level in levels),
        helper.make_node("Shape", ["g/state"], ["loop/batch"], start=0, end=1),
        helper.make_node("ConstantOfShape", ["loop/batch"], ["g/residual"], value=no_step_yet),
        helper.make_node(
            "Loop",
            ["steps", "", *(f"g/{name}" for name in CARRIED)],
            [f"loop/{name}" for name in CARRIED],
            body=_loop_graph(body.graph),
        ),
        *(helper.make_node("Identity", [f"loop/{name}"], [f"best/{name}"]) for name in ("boxes", "scores")),
        *best.graph.node,
        *(helper.make_node("Identity", [f"best/{x.name}.out"], [x.name]) for x in outputs[:-1]),
        helper.make_node("Identity", [f"loop/{CARRIED[-1]}"], [CARRIED[-1]]),
    ]
    default = helper.make_tensor("steps", TensorProto.INT64, [], [steps])
    graph = helper.make_graph(
        nodes,
        "deqdet",
        [*inputs, helper.make_tensor_value_info("steps", TensorProto.INT64, [])],
        outputs,
        initializer=[*encoder.graph.initializer, *best.graph.initializer, default],
    )
    model = helper.make_model(graph, opset_imports=encoder.opset_import, ir_version=encoder.ir_version)
    onnx.checker.check_model(model)
    return model


def _loop_graph(body: GraphProto) -> GraphProto:
    """Add the first two inputs of every Loop body: the number of the step, and whether to continue."""
    carried = [_renamed(x, x.name) for x in body.input if not x.name.startswith("f/level")]
    by_name = {x.name: x for x in body.output}
    found = [by_name[f"f/{name}.out"] for name in CARRIED]
    nodes = [*body.node, helper.make_node("Identity", ["loop/going"], ["loop/go"])]
    return helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("loop/step", TensorProto.INT64, []),
            helper.make_tensor_value_info("loop/going", TensorProto.BOOL, []),
            *carried,
            _renamed(by_name[f"f/{CARRIED[-1]}.out"], f"f/{CARRIED[-1]}"),
        ],
        [helper.make_tensor_value_info("loop/go", TensorProto.BOOL, []), *found],
        initializer=body.initializer,
    )


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy
