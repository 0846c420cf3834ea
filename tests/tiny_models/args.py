"""The smallest sizes at which each shipped model still has all of its parts.

A new model adds one entry here and is then held to every contract, and its configs to two training steps.
"""

TINY_ARGS = {
    "tokenizers": {
        "flextok": {
            "image_size": 16,
            "vae": None,
            "patch_size": 4,
            "num_registers": 8,
            "encoder_width": 32,
            "encoder_depth": 1,
            "decoder_width": 32,
            "decoder_depth": 2,
            "head_dim": 16,
            "fsq_levels": [5, 4],
            "steps": 2,
        },
    },
    "generators": {
        "gpt": {"width": 32, "depth": 2, "heads": 2, "num_classes": 10, "mlp_multiple": 16},
    },
}
