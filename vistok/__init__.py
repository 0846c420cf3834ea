"""vistok: visual tokenizers and autoregressive image generation.

The way through the package: image -> ``tokenizers`` -> ``tokens`` -> ``generators`` -> ``tokens`` -> image.
"""

__version__ = "0.1.0"
