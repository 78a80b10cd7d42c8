"""What timm's other modules would need from qvit: the words with which a model is refused."""

from __future__ import annotations

from torch import nn

# By the name of the class, since not every timm has all of them.
_NEEDS: dict[str, tuple[str, ...]] = {
    "RotaryEmbedding": ("rotary position embeddings",),
    "RotaryEmbeddingCat": ("rotary position embeddings",),
    "RotaryEmbeddingMixed": ("rotary position embeddings",),
    "RotaryEmbeddingDinoV3": ("rotary position embeddings",),
    "RelPosMlp": ("relative position biases of whole images",),
    "RelPosBias": ("relative position biases of whole images",),
    "AttentionPoolLatent": ("attention pooling",),
    "AttentionPoolPrr": ("attention pooling",),
    "HybridEmbed": ("convolutional stems",),
    "DiffAttention": ("differential attention",),
    "SwiGLU": ("gated MLPs",),
    "GluMlp": ("gated MLPs",),
    "RmsNorm": ("RMSNorm",),
    "ResPostBlock": ("norms behind the branches of a block",),
    "ResPostRelPosBlock": ("norms behind the branches of a block",),
    "ParallelScalingBlock": ("attention and MLP side by side",),
    "DiffParallelScalingBlock": ("attention and MLP side by side", "differential attention"),
    "ParallelThingsBlock": ("attention and MLP side by side",),
}


def lacks(model: nn.Module) -> str:
    """Everything in a model that qvit has no integer operation for, as the end of a sentence: ``qvit has no ..``.

    An empty string where its modules are not among the known ones.
    """
    needs = list(dict.fromkeys(need for module in model.modules() for need in _NEEDS.get(type(module).__name__, ())))
    if not needs:
        return ""
    listed = needs[0] if len(needs) == 1 else f"{', '.join(needs[:-1])} and {needs[-1]}"
    return f"qvit has no integer operations for {listed}"
