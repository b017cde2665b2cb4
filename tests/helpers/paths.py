"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
QUICK_CONFIGS = ROOT / "configs" / "quick"
SHAPES_CONFIG = QUICK_CONFIGS / "deqdet_shapes.yaml"
GOLDEN = ROOT / "tests" / "golden"
