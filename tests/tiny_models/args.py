"""The smallest sizes at which each shipped model still has all of its parts.

A new model adds one entry here and is then held to every contract, and its configs to two training steps.
"""

HEAD = {"width": 16, "depth": 1, "heads": 2}

TINY_ARGS = {
    "tokenizers": {
        "flextok": {
            "image_size": 16,
            "vae": None,
            "patch_size": 4,
            "num_registers": 8,
            "encoder_width": 32,
            "encoder_depth": 1,
            "decoder_width": 48,
            "decoder_depth": 2,
            "head_dim": 16,
            "fsq_levels": [5, 4],
            "steps": 2,
            "alignment": None,
        },
        "klvae": {
            "image_size": 16,
            "block_out_channels": [8, 16],
            "encoder_attention": True,
            "mid_block_add_attention": True,
            "layers_per_block": 1,
            "latent_channels": 3,
            "norm_num_groups": 4,
        },
        "uniflow": {
            "image_size": 16,
            "encoder": "vit_tiny_patch16_224",
            "encoder_args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
            "latent_channels": 3,
            "global_blocks": 1,
            "global_heads": 2,
            "flow_blocks": 1,
            "flow_width": 48,
            "steps": 2,
            "distillation": None,
        },
        "vqgan": {
            "image_size": 16,
            "width": 8,
            "multipliers": [1, 1, 2],
            "blocks": 1,
            "groups": 4,
            "z_channels": 12,
            "vocab_size": 24,
            "code_dim": 4,
            "codebook": {"kmeans": False},
            "scales": None,
        },
        "tokenflow": {
            "image_size": 16,
            "scales": [1, 2, 4],
            "vocab_size": 24,
            "semantic_dim": 4,
            "pixel_dim": 3,
            "encoder": "vit_tiny_patch16_224",
            "encoder_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
            "penultimate": False,
            "target_width": None,
            "semantic_decoder_width": 16,
            "semantic_decoder_depth": 1,
            "semantic_decoder_heads": 2,
            "pixel_size": None,
            "multipliers": [1, 1, 2],
            "pixel_encoder_width": 8,
            "pixel_encoder_blocks": 1,
            "pixel_decoder_width": 8,
            "pixel_decoder_blocks": 1,
            "z_channels": 8,
            "norm_num_groups": 4,
            "codebook": {"kmeans": False},
            "teacher": None,
        },
        # The name of a tiny tokenizer stands for the folder of its export.
        "tokenbridge": {"tokenizer": "klvae", "levels": 8},
    },
    "generators": {
        "gpt": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "num_classes": 10,
            "text_width": 16,
            "mlp_multiple": 16,
            "head": HEAD,
        },
        "masked": {
            "width": 32,
            "depth": 1,
            "heads": 2,
            "buffer": 2,
            "num_classes": 10,
            "head": HEAD,
            # The grids are so small that the published share would hide all of them.
            "mask_mean": 0.6,
            "mask_min": 0.4,
            "steps": 3,
        },
        "next_scale": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "mlp_hidden": 48,
            "num_classes": 10,
            "text_width": 16,
            "phi": 0,
        },
        "tokenflow_t2i": {
            "width": 16,
            "depth": 2,
            "heads": 2,
            "mlp_hidden": 32,
            "opening": 2,
            "closing": [0, 0],
            "text_vocabulary": 1,
        },
    },
}

VARIANTS = {
    "vqgan": {"scales": {"scales": [1, 2, 4], "mode": "residual", "phi": 2, "codebook": {"normalized": False}}},
    "gpt": {
        "start": {"condition": "class_start", "positions": "learned"},
        "text": {"condition": "text_cross", "positions": "learned"},
        "rotary_text": {"condition": "text_cross"},
        "prefix": {"condition": "text_prefix", "text_positions": 7},
        "any_order": {"order": "random"},
        "any_order_prefix": {"order": "random", "positions": "learned", "condition": "text_prefix"},
    },
    "next_scale": {
        "start": {"condition": "class_start", "rotary": True, "guidance_schedule": "constant"},
        "text": {"condition": "text_cross", "mode": "cascade", "phi": 0, "norm_after": True},
        "prefix": {"condition": "text_prefix", "text_positions": 7, "rotary": True},
    },
}
"""Arguments of a model that give it other parts, under names; the contracts hold for each."""
