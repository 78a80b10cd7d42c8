"""The CUDA engine: byte tensor cores and fused epilogues, compiled for the GPU at first use; needs PyTorch and an NVIDIA GPU.

Same model, same codes as `qvit.engines.reference`: integer sums are equal bit for bit, and the float steps (LayerNorm, softmax,
GELU, rectify) are the correctly rounded ones (`qvit.quantizers.exact_float`).
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from qvit.architecture import SwinArchitecture
from qvit.engines.cuda.attention_blocks import most_tokens
from qvit.engines.cuda.constants import check
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.plan import Plan
from qvit.engines.cuda.plan_swin import SwinPlan
from qvit.engines.cuda.plan_vit import VitPlan
from qvit.engines.cuda.replay import Replay
from qvit.errors import InputError, SlowerWarning, UnsupportedModelError
from qvit.integer.model import IntegerModel

if TYPE_CHECKING:
    from qvit.engines.cuda.arguments import Launch
    from qvit.engines.cuda.device import Device

_PLANS_KEPT = 4
_ALIGNED = 16  # bytes: kernels read up to so many pixels at a time


class CudaEngine:
    """Runs an `IntegerModel` on a GPU.

    Most launches of a forward pass are recorded as a CUDA graph, once a batch size; the last few are kept, with their buffers.

    Args:
        model: the frozen model.
        device: ``cuda`` or ``cuda:<n>``, or what runs launches in its place.
        one_bit: on Hopper, multiply two-bit codes as planes of bits; else as bytes, with the same result.
        overlap: on Hopper and later, let a kernel load its constants while the one before it still runs.
        all_tokens: behind the keys and values of a ViT's last block, compute tokens that no head reads as well, for comparison;
            with the same result.

    Raises:
        MissingDependencyError: cuda-bindings or NVRTC is not installed.
        InputError: there is no such GPU, or its memory does not hold the model.
        UnsupportedModelError: the GPU is older than Ampere, or the model does what the kernels do not know, or has more tokens
            than the GPU's shared memory has room for.
    """

    name = "cuda"
    takes_pixels = True  # uint8 images as they are: they are the codes of the patch embedding
    takes_tensors = True  # images on the device, logits on the device

    def __init__(
        self,
        model: IntegerModel,
        device: str | torch.device | Device = "cuda",
        one_bit: bool = True,
        overlap: bool = True,
        all_tokens: bool = False,
    ) -> None:
        check(model)
        if isinstance(device, (str, torch.device)):
            from qvit.engines.cuda.device import Gpu

            device = Gpu(device)
        self.model = model
        self._gpu, self._one_bit, self._overlap, self._all_tokens = device, one_bit, overlap, all_tokens
        self.device = device.device
        _check_length(model, device.most_shared)
        try:
            self._constants = ModelConstants.of(model, self.device)
        except torch.OutOfMemoryError:
            raise InputError(
                "The GPU's memory does not hold the model: free some of it, or use engine='cpu' or another device."
            ) from None
        self._plans: OrderedDict[int, Replay] = OrderedDict()
        self._most = sys.maxsize  # images at once: memory held no more when more were tried

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images [B, C, H, W], uint8 pixels or normalised float32 -> logits [B, classes], float32.

        Images that the GPU's memory does not hold at once go through in parts, after a `SlowerWarning`.

        Raises:
            InputError: values that are not finite, or the memory does not hold one image.
        """
        return self.forward(torch.from_numpy(np.ascontiguousarray(images))).cpu().numpy()

    def forward(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """`run`, in tensors; does not wait for the GPU where the images are uint8 and there already.

        Args:
            images: [B, C, H, W] on any device.
            codes: if given, filled with the codes at every activation point by name (int16), of all images at once: where
                the memory does not hold them, this too is an `InputError`. They are of a pass of their own, in which nothing
                is left out because it reaches no logit; the logits are those of a pass as it is without.
        """
        count = len(images)
        if count > self._most and codes is None:
            return self._in_parts(images)
        try:
            return self._forward(images, codes)
        except torch.OutOfMemoryError:
            self._plans.clear()  # makes room
            short = f"The GPU's memory does not hold the buffers of {count} image{'s' if count > 1 else ''} at once"
            if count == 1:
                raise InputError(f"{short}: free some of it, or use engine='cpu' or another device.") from None
            if codes is not None:
                raise InputError(f"{short}: use a smaller batch.") from None
        self._most = (count + 1) // 2
        warnings.warn(f"{short}: they go through in parts of {self._most}, which is slower.", SlowerWarning, stacklevel=2)
        return self._in_parts(images)

    def _in_parts(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.forward(part) for part in images.split(self._most)])

    def _forward(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None) -> torch.Tensor:
        pixels = images.dtype == torch.uint8
        ready = pixels and images.device == self.device and images.is_contiguous() and images.data_ptr() % _ALIGNED == 0
        if ready and codes is None and len(images):
            return self._logits(images)  # nothing to be done beforehand, and in one image's time every microsecond counts
        with torch.no_grad():
            if not len(images):
                return torch.zeros(0, self.model.architecture.num_classes, device=self.device)
            images = (images if pixels else images.float()).to(self.device, non_blocking=True).contiguous()
            if images.data_ptr() % _ALIGNED:
                images = images.clone()
            return self._logits(images, codes)

    def _logits(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        with self._gpu.current():
            if codes is not None:
                self._show(images, codes)
            replay = self._replay(len(images))
            plan, logits = replay.plan, replay.run(images)
        if images.dtype != torch.uint8 and int(plan.strange):
            plan.strange.zero_()
            raise InputError("The images hold values that are not finite (NaN or infinity).")
        return logits

    def launches(self, batch: int) -> list[Launch]:
        """The kernels of a forward pass of ``batch`` uint8 images (noise), in order, with buffers of their own."""
        plan = self._plan(batch)
        size = self.model.preprocessing.input_size
        pixels = torch.randint(0, 256, (batch, *size), dtype=torch.uint8, device=self.device)
        return [plan.pixels(pixels), *(step.launch for step in plan.steps)]

    def launch(self, launch: Launch) -> None:
        """Queues one of `launches` on the current stream."""
        self._gpu.launch(launch)

    def _plan(self, batch: int, with_map: bool = False) -> Plan:
        kind = SwinPlan if isinstance(self.model.architecture, SwinArchitecture) else VitPlan
        poison = self.device.type != "cuda"
        return kind(self.model, self._constants, batch, self._gpu, with_map, self._one_bit, poison, self._all_tokens)

    def _show(self, images: torch.Tensor, codes: dict[str, torch.Tensor]) -> None:
        plan = self._plan(len(images), with_map=True)
        self._gpu.compile(step.launch for step in plan.steps)
        self._gpu.launch(plan.pixels(images))
        codes["patch_embed.proj.input"] = plan.patch_tap()
        for step in plan.steps:
            self._gpu.launch(step.launch)
            for name, read in step.taps.items():
                codes[name] = read()

    def _replay(self, batch: int) -> Replay:
        replay = self._plans.get(batch)
        if replay is None:
            while len(self._plans) >= _PLANS_KEPT:
                self._plans.popitem(last=False)
            replay = self._plans[batch] = Replay(self._plan(batch), self._gpu, self._overlap)
        self._plans.move_to_end(batch)
        return replay


def _check_length(model: IntegerModel, most_shared: int) -> None:
    """Raises `UnsupportedModelError` where attention has no room for the keys and values of a head."""
    if isinstance(model.architecture, SwinArchitecture):  # windows are short: see `check`
        return
    tokens, head_dim = model.architecture.num_tokens, model.blocks[0].attention.head_dim
    if tokens > (most := most_tokens(head_dim, most_shared)):
        raise UnsupportedModelError(
            f"The CUDA engine does not run {tokens:,} tokens on this GPU, only {most:,} with heads of {head_dim} channels: use "
            "engine='reference' on device='cuda'."
        )
