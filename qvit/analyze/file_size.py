"""How large a model's ``.qvit`` file would be at other widths, byte by byte, before it is made."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qvit.analyze.products import LINEAR, products_of
from qvit.integer.file import encode
from qvit.integer.model import IntegerModel
from qvit.integer.packing import packed_size
from qvit.spec import QuantSpec

# The file's checksum is written in decimals, and the header padded to eight bytes: what that may add.
_CHECKSUM = 16


def file_bytes(template: IntegerModel, specs: Mapping[str, QuantSpec]) -> int:
    """An upper bound, at most 16 bytes above, of the size of ``template``'s file with its weights packed at other widths.

    Scales that float16 does not hold are float32 in the file, and get larger with fewer bits: so it stays a bound where no
    width of ``specs`` is above the template's.

    Args:
        template: a frozen model of the same architecture and granularities, with the classes and provenance of the file.
        specs: name of a quantization point -> its spec.
    """
    sizes = {f"{p.name}.weight": p.weights for p in products_of(template.architecture) if p.kind == LINEAR}
    tensors = {
        name: np.zeros(packed_size(sizes[name], specs[name].bits), dtype=np.uint8) if name in sizes else array
        for name, array in template.tensors.items()
    }
    header = {**template.header, "specs": {name: specs[name].to_dict() for name in template.header["specs"]}}
    return len(encode(header, tensors)) + _CHECKSUM
