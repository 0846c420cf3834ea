"""Install vistok; every other tool setting lives in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="vistok",
    version="0.1.0",
    description="Visual tokenizers and autoregressive image generation",
    packages=find_packages(include=["vistok", "vistok.*"]),
    package_data={"vistok.eval": ["weights/*.safetensors"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "lightning>=2.5",
        "omegaconf>=2.4",
        "diffusers>=0.33",
        "timm>=1.0",
        "torchmetrics>=1.6",
        "torch-fidelity>=0.3",
        "transformers>=4.48",
        "webdataset>=0.2.100",
        "safetensors",
        "numpy",
        "pyyaml",
        "braceexpand",
        "einops",
        "jaxtyping",
        "scikit-learn",
        "scipy",
        "typing_extensions",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "rich",
    ],
    extras_require={"dev": ["pytest", "pytest-timeout", "ruff", "mypy"]},
)
