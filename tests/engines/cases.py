"""Models that every engine must run: all granularities, all architectures."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"embed_dim": 24, "num_heads": 3, "depth": 2, "img_size": 32, "num_classes": 5}

GRANULARITIES: dict[str, dict[str, Any]] = {
    "no rectify": {"rectify": False},
    "input per token": {"overrides": {"blocks.*.input": {"scale": "per_token"}}},
    "input offset per tensor": {"overrides": {"blocks.*.input": {"offset": "per_tensor"}}},
    "input without offset": {"overrides": {"blocks.*.input": {"offset": "none", "signed": True}}},
    "input signed": {"overrides": {"blocks.*.input": {"signed": True}}},
    "weight per tensor": {"overrides": {"blocks.*.weight": {"scale": "per_tensor"}, "head.weight": {"scale": "per_tensor"}}},
    "q, k per token, learned offsets": {
        "overrides": {"*.q": {"scale": "per_token"}, "*.k": {"scale": "per_token", "offset": "per_head"}}
    },
    "q, k per tensor": {"overrides": {"*.q": {"scale": "per_tensor"}, "*.k": {"scale": "per_tensor"}}},
    "q, k offset per head": {"overrides": {"*.q": {"offset": "per_head"}, "*.k": {"offset": "per_head"}}},
    "q, k offset per channel": {"overrides": {"*.q": {"offset": "per_channel"}, "*.k": {"offset": "per_channel"}}},
    "q offset per channel, k per token": {
        "overrides": {"*.q": {"offset": "per_channel"}, "*.k": {"scale": "per_token", "offset": "per_channel"}}
    },
    "q, k without offset": {"overrides": {"*.q": {"offset": "none"}, "*.k": {"offset": "none"}}},
    "q unsigned half step": {"overrides": {"*.q": {"signed": False, "offset": "per_channel"}}},
    "v per head, half step": {"overrides": {"*.v": {"scale": "per_head", "offset": "half_step"}}},
    "v per channel, half step": {"overrides": {"*.v": {"offset": "half_step"}}},
    "v per tensor, offset per head": {"overrides": {"*.v": {"scale": "per_tensor", "offset": "per_head"}}},
    "v without offset": {"overrides": {"*.v": {"offset": "none"}}},
    "map per row": {"overrides": {"*.map": {"scale": "per_token"}}},
    "map per tensor": {"overrides": {"*.map": {"scale": "per_tensor"}}},
    "statsq": {"weight_quantizer": "statsq"},
    "statsq per tensor, input signed without offset": {
        "weight_quantizer": "statsq",
        "overrides": {"blocks.*.weight": {"scale": "per_tensor"}, "blocks.*.input": {"offset": "none", "signed": True}},
    },
    "statsq, input per token": {"weight_quantizer": "statsq", "overrides": {"blocks.*.input": {"scale": "per_token"}}},
    "learned steps, weights at odd half steps": {"overrides": {"blocks.*.weight": {"offset": "half_step"}}},
    "mixed widths": {
        "weight_bits": 3,
        "act_bits": 5,
        "edge_bits": 6,
        "overrides": {"blocks.1": 2, "blocks.0.attn.q": 7, "*.map": 8, "*.mlp.fc2.weight": 4, "patch_embed.proj.input": 4},
    },
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average of patches, no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "average of patches, class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "average without fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "register tokens": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "positions of patches alone": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "LayerScale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "norm before the blocks": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "no bias in qkv": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no bias in proj": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "odd image, odd patch": ("vit_tiny_patch16_224", {"img_size": (37, 23), "patch_size": (11, 7)}),
    "one patch": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 16}),
    "greyscale": ("vit_tiny_patch16_224", {"in_chans": 1, "img_size": 8, "patch_size": 2}),
    "five channels": ("vit_tiny_patch16_224", {"in_chans": 5}),
    "tanh GELU": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "QuickGELU": ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}),
    "one head, wide MLP": ("vit_tiny_patch16_224", {"num_heads": 1, "mlp_ratio": 6.5}),
}

# Options of `small_swin`; the maps are of 8 x 8 and 4 x 4 tokens and the windows of 4 x 4 where nothing else is said.
SWINS: dict[str, dict[str, Any]] = {
    "two stages": {},
    "no shift where the window is the map": {"depths": (2, 2)},
    "one stage": {"depths": (2,), "num_heads": (2,)},
    "three stages": {"patch_size": 2, "depths": (2, 2, 1), "num_heads": (2, 2, 4)},
    "shift along one axis": {"img_size": (32, 64), "depths": (1, 2)},
    "odd windows": {"img_size": 48, "window_size": 3, "depths": (2, 2)},
    "oblong windows": {"window_size": (2, 4), "depths": (2, 2)},
    "windows of each stage": {"window_size": ((2, 4), (4, 2)), "depths": (2, 2)},
    "no bias in qkv": {"qkv_bias": False},
    "greyscale": {"in_chans": 1},
    "odd heads": {"embed_dim": 21, "num_heads": (3, 7), "mlp_ratio": (2.7, 1.5)},
    "pixels beyond the last patch": {"img_size": (35, 33)},
}

SWIN_GRANULARITIES: dict[str, dict[str, Any]] = {
    "no rectify": {"rectify": False},
    "input offset per tensor": {"overrides": {"layers.*.input": {"offset": "per_tensor"}}},
    "input without offset": {"overrides": {"layers.*.input": {"offset": "none", "signed": True}}},
    "weight per tensor": {"overrides": {"layers.*.weight": {"scale": "per_tensor"}, "head.fc.weight": {"scale": "per_tensor"}}},
    "q, k per tensor": {"overrides": {"*.q": {"scale": "per_tensor"}, "*.k": {"scale": "per_tensor"}}},
    "q, k offset per channel": {"overrides": {"*.q": {"offset": "per_channel"}, "*.k": {"offset": "per_channel"}}},
    "q, k without offset": {"overrides": {"*.q": {"offset": "none"}, "*.k": {"offset": "none"}}},
    "v per channel, half step": {"overrides": {"*.v": {"offset": "half_step"}}},
    "v without offset": {"overrides": {"*.v": {"offset": "none"}}},
    "map per tensor": {"overrides": {"*.map": {"scale": "per_tensor"}}},
    "statsq": {"weight_quantizer": "statsq"},
    "mixed widths": {
        "weight_bits": 3,
        "act_bits": 5,
        "edge_bits": 6,
        "overrides": {
            "layers.0.blocks.1": 2,
            "layers.1.downsample": 3,
            "layers.0.blocks.0.attn.q": 7,
            "*.map": 8,
            "patch_embed.proj.input": 4,
        },
    },
}
