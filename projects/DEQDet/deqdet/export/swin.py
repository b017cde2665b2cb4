"""detectron2's Swin Transformer in a form that torch.export can trace with dynamic image sizes.

The original computes the sizes of padded windows by floating-point division and by nested remainders, and torch.export
cannot prove that the two agree. Here every size is a product of integers. The weights are those of the original.

B: images, H, W: the sides of a level in tokens, w: the side of a window in tokens, C: channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.modeling.backbone.swin import BasicLayer, SwinTransformerBlock, window_partition

# Added to the logits between tokens that share a window only because the shift wraps around the image.
MASKED = -100.0


class ExportedSwinBlock(SwinTransformerBlock):
    """Attention within the windows of a grid, which every second block shifts by half a window, then an MLP."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the attention and the MLP.

        Args:
            x: (B, H * W, C), with H and W as set by the stage.
            mask: (windows, w * w, w * w), added to the logits where the grid is shifted.

        Returns:
            (B, H * W, C).
        """
        side, shift = self.window_size, self.shift_size
        grid = self.norm1(x).unflatten(1, (self.H, self.W))
        lines, columns = _windows(self.H, side), _windows(self.W, side)
        grid = F.pad(grid, (0, 0, 0, columns * side - self.W, 0, lines * side - self.H))
        if shift:
            grid = grid.roll((-shift, -shift), dims=(1, 2))
        attended = self.attn(window_partition(grid, side).flatten(1, 2), mask=mask if shift else None)
        attended = attended.unflatten(0, (-1, lines, columns)).unflatten(3, (side, side))
        grid = attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, lines * w, columns * w, C)
        if shift:
            grid = grid.roll((shift, shift), dims=(1, 2))
        x = x + grid[:, : self.H, : self.W].flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class ExportedSwinStage(BasicLayer):
    """BasicLayer: some blocks, then the merging of 2 x 2 tokens into one."""

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        """Apply the blocks, and merge tokens for the next stage.

        Args:
            x: (B, H * W, C).
            height, width: H and W, which must be even if a stage follows.

        Returns:
            The stage's output, H and W, and the same for the next stage's input (the output again if there is none).
        """
        mask = self._mask(height, width, x.device)
        for block in self.blocks:
            block.H, block.W = height, width
            x = block(x, mask)
        if self.downsample is None:
            return x, height, width, x, height, width
        # In each group of 2 x 2 tokens, the left two come before the right two.
        pairs = x.unflatten(1, (height // 2, 2, width // 2, 2)).permute(0, 1, 3, 4, 2, 5)
        merged = self.downsample.reduction(self.downsample.norm(pairs.flatten(3).flatten(1, 2)))
        return x, height, width, merged, height // 2, width // 2

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """Compute (windows, w * w, w * w): 0 between tokens that may attend to each other, MASKED between others.

        The shift wraps around, so that the first rows and columns share windows with the last ones. Tokens of the first
        part must not attend to tokens of the last part, and vice versa.
        """
        regions = []
        for length in (height, width):
            padded = _windows(length, self.window_size) * self.window_size
            place = torch.arange(padded, device=device)
            regions.append((place >= padded - self.window_size).int() + (place >= padded - self.shift_size).int())
        region = 3 * regions[0][:, None] + regions[1]
        region = window_partition(region[None, :, :, None], self.window_size).flatten(1)  # (windows, w * w)
        return torch.where(region[:, None] == region[:, :, None], 0.0, MASKED)


def _windows(length: int, side: int) -> int:
    """Return the number of windows that cover `length` tokens."""
    return (length + side - 1) // side
