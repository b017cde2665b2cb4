"""Parameters and multiply-adds as text."""

from .cost import Cost
from .parameters import Parameters


def format_parameters(parameters: Parameters, depth: int = 3) -> str:
    """A table of the modules down to `depth`, each below its parent, in millions."""
    rows = {name: count for name, count in parameters.modules.items() if name.count(".") < depth}
    labels = ["  " * name.count(".") + name.rpartition(".")[2] for name in rows]
    width = max(map(len, ["Parameters", *labels]))
    lines = [f"{label:{width}}  {count / 1e6:10.3f} M" for label, count in zip(labels, rows.values(), strict=True)]
    return "\n".join(["Parameters", *lines, f"{'total':{width}}  {parameters.total / 1e6:10.3f} M"])


def format_cost(cost: Cost) -> str:
    """A table of the parts, in billions of multiply-adds (the paper's GFLOPS)."""
    rows = {
        "backbone": cost.backbone,
        "neck": cost.neck,
        "initialization layer": cost.initialization,
        "one step": cost.per_step,
        f"{cost.steps} steps": cost.per_step * cost.steps,
        "total": cost.total,
    }
    (height, width), (padded_height, padded_width) = cost.image_size, cost.padded_size
    title = f"Multiply-adds at {height} x {width} pixels, padded to {padded_height} x {padded_width}"
    head = f"{'':20}  {'linear':>10}    {'all':>10}"
    lines = [f"{name:20}  {row.linear / 1e9:10.3f} G  {row.all / 1e9:10.3f} G" for name, row in rows.items()]
    return "\n".join([title, head, *lines])
