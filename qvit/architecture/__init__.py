"""What a vision transformer looks like, independent of timm and PyTorch: enough to rebuild the graph around its tensors.

One dataclass a family. Both have ``name``, ``img_size``, ``patch_size``, ``in_chans``, ``num_classes``, ``embed_dim``,
``depth``, ``activation``, ``norm_eps``, ``num_patches``, ``patch_features``, ``patch_bias`` and ``heads`` (names of the
classification heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvit.architecture.swin import SwinArchitecture
from qvit.architecture.vit import VitArchitecture
from qvit.errors import FileFormatError

Architecture = VitArchitecture | SwinArchitecture

__all__ = ["Architecture", "SwinArchitecture", "VitArchitecture", "architecture_from_dict"]


def architecture_from_dict(data: Mapping[str, Any]) -> Architecture:
    """Reads what ``to_dict`` of either architecture wrote; without a ``family``, as in files before Swin, it is a ViT's.

    Raises:
        FileFormatError: the family is unknown, or as `VitArchitecture.from_dict` and `SwinArchitecture.from_dict`.
    """
    family = data.get("family", "vit")
    if family == "vit":
        return VitArchitecture.from_dict({name: value for name, value in data.items() if name != "family"})
    if family == SwinArchitecture.family:
        return SwinArchitecture.from_dict(data)
    raise FileFormatError(
        f"The architecture's family is {family!r}, which this qvit does not know: the file is damaged or newer."
    )
