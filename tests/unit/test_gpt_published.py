"""Released GPTs of LlamaGen: read strictly, at every size, and refused in one line."""

import pytest
import torch

from tiny_models.models import randomized
from tiny_models.text import save_t5
from vistok.checkpoint import export, export_info, load_generator, load_text_encoder
from vistok.config import Component
from vistok.config import build as build_component
from vistok.errors import UserError
from vistok.generators.gpt import GPT, Config, build
from vistok.generators.gpt_published import PUBLISHED_KEYS, from_state
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.published import main as published_command
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, TokenSpec


def of_classes(width):
    return {"cls_embedding.embedding_table.weight": (1001, width)}


def of_texts(width):
    return {
        "cls_embedding.uncond_embedding": (120, 2048),
        "cls_embedding.cap_proj.fc1.weight": (width, 2048),
        "cls_embedding.cap_proj.fc2.weight": (width, width),
    }


def published_shapes(width, depth, hidden, condition, vocab_size=16384):
    shapes = {
        **condition(width),
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


SIZES = {  # condition, width, depth, hidden channels, parameters (fact sheet, section 1.2)
    "c2i B": (of_classes, 768, 12, 2048, 110_888_448),
    "c2i L": (of_classes, 1024, 24, 2816, 342_910_976),
    "c2i XL": (of_classes, 1280, 36, 3584, 774_699_520),
    "c2i XXL": (of_classes, 1536, 48, 4096, 1_410_972_672),
    "c2i 3B": (of_classes, 3200, 24, 8704, 3_096_659_200),
    "t2i XL": (of_texts, 1280, 36, 3584, 777_678_080),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_released_size_loads_and_comes_back(size):
    condition, width, depth, hidden, parameters = SIZES[size]
    shapes = published_shapes(width, depth, hidden, condition)
    with torch.device("meta"):
        model = from_state({key: torch.empty(shape) for key, shape in shapes.items()}, 384, size)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.spec == TokenSpec(Grid2D(24, 24), (16384,), 8, 384)
    read = (model.num_classes, model.text_width, model.text_positions)
    assert model.config.zero_prefix_rotation and read == ((1000, 0, 0) if condition is of_classes else (0, 2048, 120))
    back = PUBLISHED_KEYS.to_published(model.state_dict())
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


SPEC = TokenSpec(Grid2D(2, 2), (11,), 8, 32)


def export_vq16(folder):
    sizes = {"image_size": 32, "width": 4, "multipliers": [1] * 5, "blocks": 1, "groups": 2, "z_channels": 4}
    component = Component("vqgan", {**sizes, "vocab_size": 11})
    export(folder, "tokenizer", component, SPEC, build_component("tokenizers", component).state_dict())
    return folder


@pytest.fixture
def release(tmp_path):
    """A file as it was released, one block deep and with few codes, and its model."""
    model = randomized(build(Config(depth=1, num_classes=3, zero_prefix_rotation=True), SPEC))
    state = PUBLISHED_KEYS.to_published(model.state_dict())
    torch.save({"model": {**state, "freqs_cis": torch.zeros(2)}, "steps": 5}, tmp_path / "c2i_B_256.pt")
    return tmp_path / "c2i_B_256.pt", model, state


def test_a_released_file_becomes_a_generator_beside_its_tokenizer(release, tmp_path, monkeypatch):
    path, model, _ = release
    tokenizer = export_vq16(tmp_path / "vq16")
    words = ["gpt", str(path), "--tokenizer", str(tokenizer), "--image-size", "32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["published", *words])
    published_command()
    loaded = load_generator(tmp_path / "out")
    assert export_info(tmp_path / "out")["tokenizer"] == "../vq16"
    condition, options = ClassCondition(torch.tensor([0, 2])), SampleOptions(cfg_scale=2.0)
    drawn, wanted = (each.generate(condition, options, SampleRng.from_seed(0, 2)).ids for each in (loaded, model))
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("container", [None, "module", "state_dict"])
def test_a_text_to_image_file_becomes_a_generator_beside_what_reads_its_prompts(container, tmp_path, monkeypatch):
    sizes = {"condition": "text_prefix", "text_width": 16, "text_positions": 6, "own_null": True}
    model = randomized(build(Config(depth=1, zero_prefix_rotation=True, **sizes), SPEC))
    state = PUBLISHED_KEYS.to_published(model.state_dict())
    path = tmp_path / "t2i_XL_stage1_256.pt"
    torch.save({container: state} if container else state, path)
    tokenizer, t5 = export_vq16(tmp_path / "vq16"), save_t5(tmp_path / "t5")
    words = [str(path), "--tokenizer", str(tokenizer), "--text-encoder", str(t5), "--image-size", "32"]
    monkeypatch.setattr("sys.argv", ["published", "gpt", *words, "--out", str(tmp_path / "out")])
    published_command()
    assert export_info(tmp_path / "out")["text_encoder"]["args"]["path"] == "./../t5"
    encoder, loaded = load_text_encoder(tmp_path / "out"), load_generator(tmp_path / "out")
    texts = encoder.encode(["a small red circle of 3 4 5", "blue"])
    assert texts.mask.sum(dim=1).tolist() == [6, 2]  # cut to what the generator has room for
    options = SampleOptions(cfg_scale=3.0)
    drawn, wanted = (each.generate(texts, options, SampleRng.from_seed(0, 2)).ids for each in (loaded, model))
    assert torch.equal(drawn, wanted)


def test_texts_are_read_by_the_t5_of_the_release_unless_told_otherwise(release, tmp_path, monkeypatch):
    path, _, _ = release
    model = build(Config(depth=1, condition="text_prefix", own_null=True, zero_prefix_rotation=True), SPEC)
    torch.save(PUBLISHED_KEYS.to_published(model.state_dict()), tmp_path / "t2i_XL_stage2_512.pt")
    assert GPT.from_published(str(tmp_path / "t2i_XL_stage2_512.pt")).spec.layout == Grid2D(32, 32)
    tokenizer = str(export_vq16(tmp_path / "vq16"))

    def convert(source, out, *words):
        words = (str(source), "--tokenizer", tokenizer, "--image-size", "32", "--out", str(out), *words)
        monkeypatch.setattr("sys.argv", ["published", "gpt", *words])
        published_command()

    convert(tmp_path / "t2i_XL_stage2_512.pt", tmp_path / "t2i")
    recorded = {"path": "google/flan-t5-xl", "max_length": 120}
    said = export_info(tmp_path / "t2i")["text_encoder"]
    assert said["name"] == "t5" and recorded.items() <= said["args"].items()
    with pytest.raises(UserError, match="--text-encoder is for generators conditioned on text"):
        convert(path, tmp_path / "c2i", "--text-encoder", "t5")
    assert not (tmp_path / "c2i").exists()


def test_the_name_of_a_file_tells_its_images(release):
    assert GPT.from_published(str(release[0])).spec.image_size_px == 256
    other = release[0].rename(release[0].with_name("weights.pt"))
    with pytest.raises(UserError, match="give --image-size 256, 384 or 512"):
        GPT.from_published(str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2)}, "condition.null_states is missing"),
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
