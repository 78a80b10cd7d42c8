"""What a Swin Transformer looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from qvit.architecture.fields import check_sizes, read_fields
from qvit.errors import FileFormatError

# Bounds of what a file may ask for: its tensors do not grow with the image, but the shift masks do.
_MOST_STAGES = 8
_LARGEST_WINDOW = 1024  # tokens
_LARGEST_MASK = 1 << 26  # numbers


@dataclass(frozen=True)
class SwinArchitecture:
    """Shape and options of a Swin Transformer (timm's SwinTransformer).

    Stage i works on a map of ``grid / 2^i`` tokens, each ``embed_dim * 2^i`` wide. Every map is a whole number of windows, and
    every map but the last has even sides, so nothing is ever padded.

    Attributes:
        name: timm's name of the model (``swin_tiny_patch4_window7_224``), or ``swin_transformer`` where it has none.
        img_size, patch_size: (height, width) in pixels.
        in_chans: colour channels.
        num_classes: outputs of the head.
        embed_dim: C of the first stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        windows: (height, width) in tokens of the windows of each stage, as they are used: never larger than the map.
        mlp_hidden: output features of fc1 in each stage.
        qkv_bias: qkv has a bias.
        norm_eps: eps of every LayerNorm.
    """

    name: str
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    mlp_hidden: tuple[int, ...]
    qkv_bias: bool
    norm_eps: float

    family: ClassVar[str] = "swin"
    activation: ClassVar[str] = "gelu"
    heads: ClassVar[tuple[str, ...]] = ("head.fc",)
    patch_bias: ClassVar[bool] = True

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the first map, in patches; pixels beyond the last whole patch are not seen."""
        return (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first stage."""
        return self.num_patches

    @property
    def patch_features(self) -> int:
        """K of the patch embedding: colour channels x patch height x patch width."""
        return self.in_chans * self.patch_size[0] * self.patch_size[1]

    @property
    def num_features(self) -> int:
        """Width of the last stage, which the head reads."""
        return self.width(self.stages - 1)

    def width(self, stage: int) -> int:
        """C of a stage."""
        return self.embed_dim << stage

    def head_dim(self, stage: int) -> int:
        """D of a stage."""
        return self.width(stage) // self.num_heads[stage]

    def map(self, stage: int) -> tuple[int, int]:
        """(height, width) of a stage's map, in tokens."""
        return (self.grid[0] >> stage, self.grid[1] >> stage)

    def shift(self, stage: int, block: int) -> tuple[int, int]:
        """How far the windows of a block are shifted, (down, right) in tokens.

        Every second block shifts by half a window, along the axes on which there is more than one.
        """
        if block % 2 == 0:
            return (0, 0)
        down, right = (
            0 if side <= window else window // 2 for side, window in zip(self.map(stage), self.windows[stage], strict=True)
        )
        return (down, right)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {"family": self.family, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SwinArchitecture:
        """Reads what `to_dict` wrote.

        Raises:
            FileFormatError: a field is missing, unknown or of the wrong type, or the sizes contradict each other.
        """
        a = cls(**read_fields(cls, {name: value for name, value in data.items() if name != "family"}))
        check_sizes(a, ("in_chans", "num_classes", "embed_dim", "depths", "num_heads", "mlp_hidden"))
        lengths = {len(a.depths), len(a.num_heads), len(a.windows), len(a.mlp_hidden)}
        if len(lengths) > 1 or not 1 <= a.stages <= _MOST_STAGES:
            raise FileFormatError("The architecture's lists of stages differ in length or are empty: the file is damaged.")
        check_sizes(a, ("num_features",))
        for stage in range(a.stages):
            sides, window = a.map(stage), a.windows[stage]
            split = any(side == 0 or side % part for side, part in zip(sides, window, strict=True))
            odd = stage < a.stages - 1 and any(side % 2 for side in sides)
            if split or odd or a.width(stage) % a.num_heads[stage]:
                raise FileFormatError("The architecture's sizes contradict each other: the file is damaged.")
            area = window[0] * window[1]
            if area > _LARGEST_WINDOW or area * sides[0] * sides[1] > _LARGEST_MASK:
                raise FileFormatError("A window or map of the architecture is out of range: the file is damaged.")
        return a
