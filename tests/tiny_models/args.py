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
    },
}

VARIANTS = {
    "gpt": {
        "start": {"condition": "class_start", "positions": "learned"},
        "text": {"condition": "text_cross", "positions": "learned"},
        "rotary_text": {"condition": "text_cross"},
    },
}
"""Arguments of a generator that give it other parts, under names; the contracts hold for each."""
