"""What a plain ViT or DeiT looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qvit.architecture.fields import check_sizes, read_fields
from qvit.errors import FileFormatError


@dataclass(frozen=True)
class VitArchitecture:
    """Shape and options of a plain ViT or DeiT (timm's VisionTransformer and VisionTransformerDistilled).

    Attributes:
        name: timm's name of the model (``deit_small_patch16_224``), or ``vision_transformer`` where it has none.
        img_size, patch_size: (height, width) in pixels.
        in_chans: colour channels.
        num_classes: outputs of each head.
        embed_dim, depth, num_heads: C, L, H.
        mlp_hidden: output features of fc1.
        qkv_bias, proj_bias, patch_bias: which layers have a bias (``proj_bias`` covers proj, fc1 and fc2).
        class_token, dist_token, reg_tokens: prefix tokens; ``dist_token`` brings a second head.
        pos_embed: has a learned position embedding; ``no_embed_class``: it covers the patches alone.
        pre_norm: LayerNorm before the blocks; ``final_norm``: after them; ``fc_norm``: after pooling.
        global_pool: ``token`` or ``avg``; ``pool_include_prefix``: prefix tokens count in the average.
        layer_scale: the branches end in a LayerScale.
        activation: ``gelu``, ``gelu_tanh`` or ``quick_gelu``.
        norm_eps: eps of every LayerNorm.
    """

    name: str
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    qkv_bias: bool
    proj_bias: bool
    patch_bias: bool
    class_token: bool
    dist_token: bool
    reg_tokens: int
    pos_embed: bool
    no_embed_class: bool
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    global_pool: str
    pool_include_prefix: bool
    layer_scale: bool
    activation: str
    norm_eps: float

    @property
    def head_dim(self) -> int:
        """D, the width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of an image; pixels beyond the last whole patch are not seen."""
        return (self.img_size[0] // self.patch_size[0]) * (self.img_size[1] // self.patch_size[1])

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return int(self.class_token) + int(self.dist_token) + self.reg_tokens

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_patches + self.num_prefix_tokens

    @property
    def patch_features(self) -> int:
        """K of the patch embedding: colour channels x patch height x patch width."""
        return self.in_chans * self.patch_size[0] * self.patch_size[1]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the classification heads; several are averaged."""
        return ("head", "head_dist") if self.dist_token else ("head",)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VitArchitecture:
        """Reads what `to_dict` wrote.

        Raises:
            FileFormatError: a field is missing, unknown or of the wrong type, or the sizes contradict each other.
        """
        architecture = cls(**read_fields(cls, data))
        sizes = ("in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_hidden")
        check_sizes(architecture, sizes)
        if not 0 <= architecture.reg_tokens <= 4096:
            raise FileFormatError("A size of the architecture is out of range: the file is damaged.")
        for name, known in (("global_pool", ("token", "avg")), ("activation", ("gelu", "gelu_tanh", "quick_gelu"))):
            value = getattr(architecture, name)
            if value not in known:
                raise FileFormatError(f"The architecture's {name} is {value!r}, which this qvit does not know.")
        if architecture.global_pool == "token" and not (architecture.class_token or architecture.reg_tokens):
            raise FileFormatError("The architecture pools a class token that it does not have: the file is damaged.")
        if architecture.dist_token and not (architecture.class_token and architecture.global_pool == "token"):
            raise FileFormatError("The architecture has a distillation token without a class token: the file is damaged.")
        if architecture.embed_dim % architecture.num_heads or not architecture.num_patches:
            raise FileFormatError("The architecture's sizes contradict each other: the file is damaged.")
        return architecture
