"""A process that makes a model for `qvit.bench.worker`, so that what that takes is gone before anything is measured.

    python -m qvit.bench.prepare '{"name": "deit_small_patch16_224", "bits": 4, "path": "model.qvit"}'
    python -m qvit.bench.prepare '{"peer": "openvino", "file": "model.qvit", "batch": 1, "path": "folder"}'

Its one reply is a line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from qvit.errors import QvitError


def main() -> None:
    """Prepares what the argument says."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    try:
        _prepare(json.loads(sys.argv[1]))
    except Exception as error:  # whatever a foreign library raises is told to the parent, which goes on without it
        said = str(error) if isinstance(error, QvitError) else f"{type(error).__name__}: {error}"
        replies.write(json.dumps({"error": " ".join(said.split())}) + "\n")
        raise SystemExit(1) from error
    replies.write("{}\n")


def _prepare(request: dict[str, Any]) -> None:
    from qvit.bench.models import float_model, write_random_model

    path = Path(request["path"])
    if "name" in request:
        write_random_model(request["name"], request["bits"], path, residual=request.get("residual", "float32"))
        return
    from qvit.bench.peers import peer_named
    from qvit.integer.model import IntegerModel

    architecture = IntegerModel.load(request["file"]).architecture
    peer_named(request["peer"]).prepare(float_model(architecture), architecture, request["batch"], path)


if __name__ == "__main__":
    main()
