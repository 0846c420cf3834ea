"""TokenFlow's text-to-image generator: its captions, the end of its text, and folders as its authors release them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny_models.args import TINY_ARGS
from tiny_models.models import component_of, make_generator, make_tokenizer
from tiny_models.text import save_t5
from vistok.checkpoint import export, load_generator, load_text_encoder
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.generators import tokenflow_t2i
from vistok.generators.conditions import TextPrefix
from vistok.interfaces import SampleOptions, TextCondition
from vistok.published import main as published_command
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, TokenSpec

SPEC = TokenSpec(MultiScale(((1, 1), (2, 2), (3, 3))), (13,), 3, 16)
WORDS = ["<s>", "</s>", "<unk>", "[PAD]", "a", "red", "circle", "<", "</", "img", ">"]
CODES = 24
TOWER = TINY_ARGS["tokenizers"]["tokenflow"]["encoder_args"]


def texts(*lengths, width=16):
    states = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextCondition(states, mask, states[:1, :1], mask[:1, :1])


def test_a_text_stands_right_before_the_start():
    prefix, condition = TextPrefix(16, length=5, start=2), texts(3, 1)
    inputs, there, _ = prefix(condition)
    assert there.tolist() == [[False, False] + [True] * 5, [False] * 4 + [True] * 3]
    assert torch.equal(inputs[0, 2:5], condition.states[0]) and torch.equal(inputs[1, 4], condition.states[1, 0])
    assert torch.equal(inputs[:, 5:], prefix.start.weight.expand(2, -1, -1))
    with pytest.raises(UserError, match=r"room for 2 states of a text, got 3: set .*max_length=2"):
        TextPrefix(16, length=2, start=2)(condition)


def test_what_is_no_text_has_no_influence():
    model, condition = make_generator("tokenflow_t2i", SPEC), texts(3, 1)
    ids = torch.randint(0, 13, (2, 14, 1), generator=torch.Generator().manual_seed(0))
    before = model.logits(ids, condition)
    condition.states[1, 1:] += 1
    torch.testing.assert_close(model.logits(ids, condition), before)
    condition.states[1, 0] += 1
    after = model.logits(ids, condition)
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] != before[1]).any(-1).all()


def test_it_samples_codes_and_no_words():
    model = make_generator("tokenflow_t2i", SPEC, text_vocabulary=5)
    with torch.no_grad():
        model.head.weight[:5] *= 100
    tokens = model.generate(texts(3, 1), SampleOptions(cfg_scale=3.0), SampleRng.from_seed(0, 2))
    assert tokens.ids.shape == (2, 14, 1)  # and legal: Tokens checks them


def test_the_loss_counts_the_end_of_the_text():
    model = make_generator("tokenflow_t2i", SPEC, text_vocabulary=5, closing=[4, 2, 3])
    tokens = model.generate(texts(3, 1), SampleOptions(), SampleRng.from_seed(0, 2))
    start, there, contexts = model.condition.prefix(texts(3, 1), model.blocks)
    outputs = model.backbone(model.text_sequence(start, tokens.ids[:, :, 0]), there, contexts)[:, model.front :]
    nats = -model.head(outputs).log_softmax(-1)
    closing = torch.stack([nats[:, 14 + n, word] for n, word in enumerate([4, 2, 3])])
    of_codes = nats[:, :14, 5:].gather(2, tokens.ids).sum()
    expected = (of_codes + closing.sum()) / (2 * 17)
    torch.testing.assert_close(model.loss(tokens, texts(3, 1), torch.Generator()).total, expected)


@pytest.mark.parametrize("wrong", [{"closing": [1]}, {"closing": [0, 7]}, {"opening": 0}])
def test_numbers_that_no_model_can_have(wrong):
    with pytest.raises(UserError, match=f"tokenflow_t2i: {next(iter(wrong))}"):
        make_generator("tokenflow_t2i", SPEC, text_vocabulary=3, **wrong)


# ---------------------------------------------------------------------- the release


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder as the authors lay it out, of three scales and 24 codes, its weights in two files."""
    monkeypatch.setattr(tokenflow_t2i, "SCALES", (1, 2, 3))
    codes = [f"<vq_token_{number}>" for number in range(CODES)]
    vocabulary = {word: index for index, word in enumerate(WORDS + codes)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("img", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "rms_norm_eps": 1e-5, "model_type": "llama"}))
    spec = TokenSpec(MultiScale(((1, 1), (2, 2), (3, 3))), (CODES,), 40, 48)
    config = tokenflow_t2i.Config(16, 2, 2, 24, opening=3, closing=[8, 9, 10, 1], text_vocabulary=len(WORDS))
    torch.manual_seed(0)
    model = tokenflow_t2i.build(config, spec)
    torch.nn.init.normal_(model.head.weight)
    table = torch.randn(len(vocabulary), 16)
    model.condition.start.weight.data, model.closing.weight.data = table[[7, 9, 10]], table[[8, 9, 10]]
    own = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in ("codes", "condition", "closing")}
    state = tokenflow_t2i.published_keys(8).to_published(own) | {"model.embed_tokens.weight": table}
    parts = {"a.safetensors": sorted(state)[:5], "b.safetensors": sorted(state)[5:]}
    for name, keys in parts.items():
        save_file({key: state[key].contiguous() for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, model, table


def test_a_released_folder_is_read(release):
    folder, model, _ = release
    loaded = tokenflow_t2i.from_published(str(folder))
    assert loaded.config == model.config and loaded.spec == model.spec and not loaded.training
    ids = torch.randint(0, CODES, (2, 14, 1), generator=torch.Generator().manual_seed(0))
    loaded.codes.load_state_dict(model.codes.state_dict())
    torch.testing.assert_close(loaded.logits(ids, texts(3, 1)), model.eval().logits(ids, texts(3, 1)))


def test_a_repository_is_read_as_its_folder(release, monkeypatch):
    folder, model, table = release
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: {"owner/t2i": str(folder)}[name])
    assert tokenflow_t2i.from_published("owner/t2i").config == model.config
    words = build("text_encoders", Component("words", {"path": "owner/t2i"}))
    assert torch.equal(words.encode(["a red"]).states[0], table[[0, 4, 5]])
    with pytest.raises(UserError, match=r"TokenFlow-t2i not found: gone \(a folder, or OWNER/REPOSITORY"):
        tokenflow_t2i.from_published("gone")


def test_its_captions_are_its_own_word_vectors(release):
    folder, _, table = release
    encoder = build("text_encoders", Component("words", {"path": str(folder), "max_length": 3}))
    condition = encoder.encode(["a red circle", ""])
    assert torch.equal(condition.states[0], table[[0, 4, 5]]) and torch.equal(condition.states[1, 0], table[0])
    assert condition.mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(condition.null().states[0], table[:1]) and not encoder.model.weight.requires_grad


def test_the_command_exports_it_with_its_words(release, tmp_path_factory, monkeypatch):
    folder, _, _ = release
    sizes = {"image_size": 48, "scales": [1, 2, 3], "semantic_dim": 32, "pixel_dim": 8, "multipliers": [1] * 5}
    tokenizer = make_tokenizer("tokenflow", **sizes, encoder_args={**TOWER, "patch_size": 16})
    out = tmp_path_factory.mktemp("exports")
    export(out / "tokenizer", "tokenizer", component_of(tokenizer), tokenizer.spec, tokenizer.state_dict())
    words = [str(folder), "--tokenizer", str(out / "tokenizer"), "--out", str(out / "t2i")]
    monkeypatch.setattr("sys.argv", ["published", "tokenflow_t2i", *words])
    published_command()
    condition = load_text_encoder(out / "t2i").encode(["a red circle"])
    tokens = load_generator(out / "t2i").generate(condition, SampleOptions(cfg_scale=2.0), SampleRng.from_seed(0, 1))
    assert tokens.spec == tokenizer.spec


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("config.json", "lacks config.json"), ("a.safetensors", "a.safetensors"), ("tokenizer.json", "tokenizer")],
)
def test_a_missing_file_is_one_line(release, name, complaint):
    folder, _, _ = release
    (folder / name).unlink()
    with pytest.raises(UserError, match=complaint) as error:
        tokenflow_t2i.from_published(str(folder))
    assert "\n" not in str(error.value)


def test_a_stock_llama_is_refused(release):
    folder, _, _ = release
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": torch.zeros(35, 16)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.pos_1LC is missing: this is no TokenFlow-t2i"):
        tokenflow_t2i.from_published(str(folder))


def test_words_of_a_t5_and_of_nothing(tmp_path):
    encoder = build("text_encoders", Component("words", {"path": str(save_t5(tmp_path / "t5"))}))
    assert encoder.encode(["a red circle"]).states.shape == (1, 4, encoder.width)
    with pytest.raises(UserError, match=r"has no weights: supply model\.safetensors"):
        build("text_encoders", Component("words", {"path": str(tmp_path)}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has no word vectors"):
        build("text_encoders", Component("words", {"path": str(tmp_path)}))
