"""The reference engine: every op of the op table in a few lines of PyTorch integers. Slow, readable, exact.

Other engines are tested against it code by code; it is tested against the training graph the same way. It reads only the
`IntegerModel`, never the student.

The float steps (LayerNorm, softmax, GELU, the standardisation of IRM, the average of tokens) are by definition the float32
nearest to the real value, for which they are evaluated in float64 (`qvit.quantizers.exact_float`), so that every engine that
keeps to it computes the same codes, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch

from qvit.architecture import SwinArchitecture
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.quantizers import exact_float
from qvit.quantizers.exact_matmul import exact_matmul
from qvit.spec import PerGroup, QuantSpec

Codes = torch.Tensor


def _largest(spec: QuantSpec) -> int:
    return max(-spec.qn, spec.qp)


def _sums(a: Codes, b: Codes, spec_a: QuantSpec, spec_b: QuantSpec) -> torch.Tensor:
    """int32 sums [.., N, M] of codes a [.., N, K] and b [.., K, M]."""
    return exact_matmul(a, b, _largest(spec_a), _largest(spec_b)).to(torch.int32)


class ReferenceEngine:
    """Runs an `IntegerModel` with PyTorch.

    Args:
        model: the frozen model.
        device: where PyTorch computes.
    """

    name = "reference"

    def __init__(self, model: IntegerModel, device: str | torch.device = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)
        # Keyed by identity; the array is kept beside its tensor, so that its id stays taken.
        self._constants: dict[int, tuple[np.ndarray, torch.Tensor]] = {}
        self._positions: dict[int, torch.Tensor] = {}  # by the identity of the model's tables
        self._weights = {layer.name: self._tensor(layer.weight.codes()) for layer in model.linears()}
        self._biases = {layer.name: self._maybe(layer.folded_bias()) for layer in model.linears()}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        """A constant of the model on the device, moved once."""
        if id(array) not in self._constants:
            self._constants[id(array)] = array, torch.from_numpy(np.array(array)).to(self.device)
        return self._constants[id(array)][1]

    def _expanded(self, windows: ops.Windows) -> torch.Tensor:
        """The bias [H, N, N], expanded once."""
        key = id(windows.bias_table)
        if key not in self._positions:
            self._positions[key] = torch.from_numpy(windows.bias()).to(self.device)
        return self._positions[key]

    def _maybe(self, array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else self._tensor(array)

    # --- the op table -------------------------------------------------------------------------------------------------

    def quantize(self, x: torch.Tensor, quantizer: ops.Quantizer) -> Codes:
        """float [.., C] -> codes, int16."""
        scale = self._tensor(quantizer.scale)
        if isinstance(quantizer.spec.scale, PerGroup):
            scale = scale.repeat_interleave(quantizer.spec.scale.size, dim=-1)
        shifted = x if quantizer.offset is None else x - self._tensor(quantizer.offset)
        return (shifted / scale).round().clamp(quantizer.spec.qn, quantizer.spec.qp).to(torch.int16)

    def norm(self, x: torch.Tensor, norm: ops.LayerNorm | None) -> torch.Tensor:
        """LayerNorm over the last dimension, float32 [.., C]."""
        if norm is None:
            return x
        return exact_float.layer_norm(x, self._tensor(norm.weight), self._tensor(norm.bias), norm.eps)

    def linear(self, codes: Codes, layer: ops.Linear) -> torch.Tensor:
        """codes [.., K] -> float [.., M]: int32 sums, then the float epilogue."""
        weight, bias = self._weights[layer.name], self._biases[layer.name]
        scale_x, scale_w = self._tensor(layer.input.scale), self._tensor(layer.weight.scale)
        specs = layer.input.spec, layer.weight.spec
        grouped = [spec.scale.size for spec in specs if isinstance(spec.scale, PerGroup)]
        if not grouped:
            sums = self._weight_sums(codes, weight, layer)
            y = sums * (scale_x * scale_w.flatten())
        else:
            y = torch.zeros(*codes.shape[:-1], layer.weight.shape[0], device=self.device)
            for g in range(codes.shape[-1] // grouped[0]):
                part = slice(g * grouped[0], (g + 1) * grouped[0])
                step_x = scale_x[g] if isinstance(specs[0].scale, PerGroup) else scale_x
                step_w = scale_w[:, g] if isinstance(specs[1].scale, PerGroup) else scale_w.flatten()
                y = y + self._weight_sums(codes[..., part], weight[:, part], layer) * (step_x * step_w)
        return y if bias is None else y + bias

    def _weight_sums(self, codes: Codes, weight: Codes, layer: ops.Linear) -> torch.Tensor:
        """codes [.., K], codes of a weight [M, K] -> sums [.., M] in units of both scales, whole or half numbers in float32."""
        sums = _sums(codes, weight.t(), layer.input.spec, layer.weight.spec)
        if not layer.weight.half_step:
            return sums.float()
        return (2 * sums + codes.to(torch.int32).sum(-1, keepdim=True)).float() * 0.5

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """The activation between fc1 and fc2."""
        return exact_float.activation(x, self.model.architecture.activation)

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream as blocks and norms read it, float32 [B, N, C] (`qvit.integer.ops.Block`)."""
        return x.half().float() if self.model.residual == "float16" else x

    def rectify(self, x: torch.Tensor, rectify: ops.Rectify | None) -> torch.Tensor:
        """IRM, float [B, H, N, D]."""
        if rectify is None:
            return x
        z = exact_float.standardise(x, rectify.eps)
        return z * self._tensor(rectify.weight)[:, None] + self._tensor(rectify.bias)[:, None]

    def scores(self, q: Codes, k: Codes, attention: ops.Attention) -> torch.Tensor:
        """codes [B, H, N, D] -> float scores [B, H, N, N], up to a constant a row (`qvit.integer.ops.Attention`)."""
        scale_q, scale_k = self._tensor(attention.q.scale), self._tensor(attention.k.scale)
        scale_k = scale_k.transpose(-2, -1) if scale_k.dim() > 1 else scale_k
        scale = scale_q * attention.factor * scale_k
        sums = _sums(q, k.transpose(-2, -1), attention.q.spec, attention.k.spec)
        if attention.q.half_step:
            doubled = 2 * sums + k.to(torch.int32).sum(-1)[..., None, :]
            return doubled.float() * 0.5 * scale
        scores = sums.float() * scale
        if attention.q.offset is not None:
            column = (k.double() * self._tensor(attention.q.offset)).sum(-1).float()[..., None, :]
            scores = scores + column * (scale_k * attention.factor)
        return scores

    def place(self, scores: torch.Tensor, windows: ops.Windows) -> torch.Tensor:
        """Scores [B W, H, N, N] with the relative position bias and, in shifted windows, the mask."""
        scores = scores + self._expanded(windows)
        mask = self._maybe(windows.mask())
        if mask is None:
            return scores
        return (scores.unflatten(0, (-1, windows.count)) + mask[:, None]).flatten(0, 1)

    def values(self, p: Codes, v: Codes, attention: ops.Attention) -> torch.Tensor:
        """codes of the softmax map [B, H, N, N] and of v [B, H, N, D] -> float [B, H, N, D]."""
        scale_p, scale_v = self._tensor(attention.map.scale), self._tensor(attention.v.scale)
        sums = _sums(p, v, attention.map.spec, attention.v.spec)
        if attention.v.offset is None:
            return sums.float() * (scale_p * scale_v)
        rows = p.to(torch.int32).sum(-1, keepdim=True)
        if attention.v.half_step:
            return (2 * sums + rows).float() * 0.5 * (scale_p * scale_v)
        return sums.float() * (scale_p * scale_v) + rows.float() * (scale_p * self._tensor(attention.v.offset))

    def run(self, images: np.ndarray) -> np.ndarray:
        """Normalised float32 images [B, C, H, W] -> logits [B, classes], float32."""
        return self.forward(torch.from_numpy(images)).cpu().numpy()

    # --- the graph ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes], float32.

        Args:
            images: float32 on any device.
            codes: if given, filled with the codes at every activation point by name (int16).
        """
        taps = {} if codes is None else codes
        pooled = self._pooled(images, taps)
        logits = [self._linear(feature, head, taps) for feature, head in zip(pooled, self.model.heads, strict=True)]
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, C, H, W] -> what the heads read, float32 [B, C]; the mean where there are two heads.

        The training graph's are timm's ``forward_head(forward_features(images), pre_logits=True)``.
        """
        pooled = self._pooled(images, {})
        return pooled[0] if len(pooled) == 1 else (pooled[0] + pooled[1]) / 2

    def _pooled(self, images: torch.Tensor, taps: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What each head reads, float32 [B, C]."""
        model, a = self.model, self.model.architecture
        x = self._embed(images.to(self.device, torch.float32), taps)
        for stage in model.stages:
            if stage.merging is not None:
                x = self._merge(x, stage.merging, taps)
            for block in stage.blocks:
                x = self._block(x, block, taps)
        x = self.norm(x, model.norm)
        if isinstance(a, SwinArchitecture):
            pooled = [x.double().mean(dim=1).float()]
        elif a.dist_token:
            pooled = [x[:, 0], x[:, 1]]
        elif a.global_pool == "token":
            pooled = [x[:, 0]]
        else:
            pooled = [(x if a.pool_include_prefix else x[:, a.num_prefix_tokens :]).double().mean(dim=1).float()]
        return [self.norm(feature, model.fc_norm) for feature in pooled]

    def _linear(self, x: torch.Tensor, layer: ops.Linear, taps: dict[str, torch.Tensor]) -> torch.Tensor:
        codes = taps[f"{layer.name}.input"] = self.quantize(x, layer.input)
        return self.linear(codes, layer)

    def _embed(self, images: torch.Tensor, taps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Patches, tokens and positions: images -> [B, N, C]."""
        model, a = self.model, self.model.architecture
        b = len(images)
        (ph, pw), (rows, columns) = a.patch_size, (a.img_size[0] // a.patch_size[0], a.img_size[1] // a.patch_size[1])
        x = images[:, :, : rows * ph, : columns * pw].reshape(b, a.in_chans, rows, ph, columns, pw)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, a.patch_features)
        std = torch.tensor(model.preprocessing.std, device=self.device).repeat_interleave(ph * pw)
        x = self._linear(x * std, model.patch, taps)
        if isinstance(a, SwinArchitecture):
            return self.stream(self.norm(x, model.norm_pre))
        prefix = [
            self._tensor(token).expand(b, -1, -1)
            for token in (model.cls_token, model.dist_token, model.reg_token)
            if token is not None
        ]
        position = self._maybe(model.pos_embed)
        if a.no_embed_class:
            x = x if position is None else x + position
            x = torch.cat([*prefix, x], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1)
            x = x if position is None else x + position
        return self.stream(self.norm(x, model.norm_pre))

    def _merge(self, x: torch.Tensor, merging: ops.PatchMerging, taps: dict[str, torch.Tensor]) -> torch.Tensor:
        """2 x 2 neighbours become one token, [B, L, C] -> [B, L / 4, M]."""
        (rows, columns), c = merging.map, x.shape[-1]
        squares = x.reshape(len(x), rows // 2, 2, columns // 2, 2, c)
        neighbours = torch.cat([squares[:, :, down, :, right] for right in (0, 1) for down in (0, 1)], dim=-1)
        return self.stream(self._linear(self.norm(neighbours, merging.norm), merging.reduction, taps).flatten(1, 2))

    def _block(self, x: torch.Tensor, block: ops.Block, taps: dict[str, torch.Tensor]) -> torch.Tensor:
        """One transformer block, [B, N, C] -> [B, N, C]."""
        y = self._attention(self.norm(x, block.norm1), block, taps)
        x = self.stream(x + (y if block.ls1 is None else y * self._tensor(block.ls1)))
        y = self._linear(self.norm(x, block.norm2), block.fc1, taps)
        y = self._linear(self.gelu(y), block.fc2, taps)
        return self.stream(x + (y if block.ls2 is None else y * self._tensor(block.ls2)))

    def _attention(self, x: torch.Tensor, block: ops.Block, taps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Attention with its linear layers, [B, N, C] -> [B, N, C], in windows where it has some."""
        attention, windows, name = block.attention, block.attention.windows, f"{block.name}.attn"
        tokens = None if windows is None else self._tensor(windows.tokens()).long()
        if tokens is not None:
            x = x[:, tokens].flatten(0, 1)
        b, n, c = x.shape
        qkv = self._linear(x, block.qkv, taps)
        q, k, v = qkv.reshape(b, n, 3, attention.heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q = taps[f"{name}.q"] = self.quantize(self.rectify(q, attention.rectify_q), attention.q)
        k = taps[f"{name}.k"] = self.quantize(self.rectify(k, attention.rectify_k), attention.k)
        v = taps[f"{name}.v"] = self.quantize(v, attention.v)
        scores = self.scores(q, k, attention)
        if windows is not None:
            scores = self.place(scores, windows)
        p = taps[f"{name}.map"] = self.quantize(exact_float.softmax(scores), attention.map)
        y = self._linear(self.values(p, v, attention).transpose(1, 2).reshape(b, n, c), block.proj, taps)
        if tokens is None:
            return y
        back = torch.empty_like(tokens.flatten())
        back[tokens.flatten()] = torch.arange(tokens.numel(), device=self.device)
        return y.reshape(-1, tokens.numel(), c)[:, back]
