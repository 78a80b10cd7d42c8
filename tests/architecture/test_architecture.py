"""Which family an architecture is of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qvit.architecture import SwinArchitecture, VitArchitecture, architecture_from_dict
from qvit.errors import FileFormatError

from .test_swin import TINY
from .test_vit import DEIT


def test_each_comes_back_as_what_it_was() -> None:
    assert architecture_from_dict(TINY.to_dict()) == TINY
    assert isinstance(architecture_from_dict(TINY.to_dict()), SwinArchitecture)
    assert isinstance(architecture_from_dict(DEIT.to_dict()), VitArchitecture)


def test_files_before_swin_name_no_family() -> None:
    assert "family" not in DEIT.to_dict()
    assert architecture_from_dict(DEIT.to_dict() | {"family": "vit"}) == DEIT


@pytest.mark.parametrize("family", ["beit", 3, None, [], {}])
def test_an_unknown_family_is_refused(family: object) -> None:
    with pytest.raises(FileFormatError, match="family"):
        architecture_from_dict(TINY.to_dict() | {"family": family})


def test_one_family_is_not_read_as_the_other() -> None:
    with pytest.raises(FileFormatError, match="missing or unknown"):
        architecture_from_dict({name: value for name, value in TINY.to_dict().items() if name != "family"})
    with pytest.raises(FileFormatError, match="missing or unknown"):
        architecture_from_dict(DEIT.to_dict() | {"family": "swin"})


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['timm'] = sys.modules['numpy'] = None; import qvit.architecture"
    subprocess.run([sys.executable, "-c", code], check=True)
