"""Released GPTs of LlamaGen: read strictly, at every size, and refused in one line."""

import pytest
import torch

from tiny_models.models import randomized
from vistok.checkpoint import export, export_info, load_generator
from vistok.config import Component
from vistok.config import build as build_component
from vistok.errors import UserError
from vistok.generators.gpt import GPT, Config, build
from vistok.generators.gpt_published import PUBLISHED_KEYS, from_state
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.published import main as published_command
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, TokenSpec

SIZES = {  # width, depth, hidden channels, parameters (fact sheet, section 1.2)
    "B": (768, 12, 2048, 110_888_448),
    "L": (1024, 24, 2816, 342_910_976),
    "XL": (1280, 36, 3584, 774_699_520),
    "XXL": (1536, 48, 4096, 1_410_972_672),
    "3B": (3200, 24, 8704, 3_096_659_200),
}


def published_shapes(width, depth, hidden, vocab_size=16384, classes=1000):
    shapes = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (vocab_size, width),
        "output.weight": (vocab_size, width),
        "norm.weight": (width,),
    }
    for layer in (f"layers.{index}" for index in range(depth)):
        shapes |= {f"{layer}.attention.wqkv.weight": (3 * width, width), f"{layer}.attention.wo.weight": (width, width)}
        shapes |= {f"{layer}.feed_forward.{name}.weight": (hidden, width) for name in ("w1", "w3")}
        shapes |= {f"{layer}.feed_forward.w2.weight": (width, hidden)}
        shapes |= {f"{layer}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    return shapes


@pytest.mark.parametrize("size", SIZES)
def test_every_released_size_loads_and_comes_back(size):
    width, depth, hidden, parameters = SIZES[size]
    shapes = published_shapes(width, depth, hidden)
    with torch.device("meta"):
        model = from_state({key: torch.empty(shape) for key, shape in shapes.items()}, 384, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.spec == TokenSpec(Grid2D(24, 24), (16384,), 8, 384)
    assert model.config.zero_prefix_rotation and model.num_classes == 1000
    back = PUBLISHED_KEYS.to_published(model.state_dict())
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


SPEC = TokenSpec(Grid2D(2, 2), (11,), 8, 32)


@pytest.fixture
def release(tmp_path):
    """A file as it was released, one block deep and with few codes, and its model."""
    model = randomized(build(Config(depth=1, num_classes=3, zero_prefix_rotation=True), SPEC))
    state = PUBLISHED_KEYS.to_published(model.state_dict())
    torch.save({"model": {**state, "freqs_cis": torch.zeros(2)}, "steps": 5}, tmp_path / "c2i_B_256.pt")
    return tmp_path / "c2i_B_256.pt", model, state


def test_a_released_file_becomes_a_generator_beside_its_tokenizer(release, tmp_path, monkeypatch):
    path, model, _ = release
    tokenizer = tmp_path / "vq16"
    sizes = {"image_size": 32, "width": 4, "multipliers": [1] * 5, "blocks": 1, "groups": 2, "z_channels": 4}
    component = Component("vqgan", {**sizes, "vocab_size": 11})
    export(tokenizer, "tokenizer", component, SPEC, build_component("tokenizers", component).state_dict())
    words = ["gpt", str(path), "--tokenizer", str(tokenizer), "--image-size", "32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["published", *words])
    published_command()
    loaded = load_generator(tmp_path / "out")
    assert export_info(tmp_path / "out")["tokenizer"] == "../vq16"
    condition, options = ClassCondition(torch.tensor([0, 2])), SampleOptions(cfg_scale=2.0)
    drawn, wanted = (each.generate(condition, options, SampleRng.from_seed(0, 2)).ids for each in (loaded, model))
    assert torch.equal(drawn, wanted)


def test_the_name_of_a_file_tells_its_images(release):
    assert GPT.from_published(str(release[0])).spec.image_size_px == 256
    other = release[0].rename(release[0].with_name("weights.pt"))
    with pytest.raises(UserError, match="give --image-size 256 or 384"):
        GPT.from_published(str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2)}, "text-conditional"),
        ({"extra.weight": torch.zeros(1)}, r"extra\.weight"),
        ({"norm.weight": None}, "norm.weight"),
        ({"tok_embeddings.weight": torch.zeros(11, 640)}, "width 640 is none of the released"),
        ({"tok_embeddings.weight": None}, "adapter.embedding.weight is missing"),
    ],
)
def test_other_weights_are_refused(release, change, message):
    state = {key: value for key, value in (release[2] | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        from_state(state, 256, "file")


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "c2i_B_256.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        GPT.from_published(str(tmp_path / "c2i_B_256.pt"))
    with pytest.raises(UserError, match="published LlamaGen GPT not found"):
        GPT.from_published(str(tmp_path / "absent_256.pt"))
