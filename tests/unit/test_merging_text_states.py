"""Semantic binding in the states that condition a generator of codes."""

from functools import partial

import pytest
import torch

from tiny_models.models import SPECS, make_generator
from tiny_models.text import save_clip, save_t5
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.interfaces import SampleOptions
from vistok.merging.entities import Entity
from vistok.merging.text_states import composite, reading_apart, uncontextualised
from vistok.rng import SampleRng

PROMPTS = ["a red circle and a blue square", "a white star"]
ENTITIES = [[Entity("circle", ("red",)), Entity("square", ("blue",))], [Entity("star", ("white",))]]


@pytest.fixture
def encoder():
    return build("text_encoders", Component("bytes", {"width": 64}))


@pytest.fixture
def t5(tmp_path):
    return build("text_encoders", Component("t5", {"path": str(save_t5(tmp_path / "t5"))}))


def test_an_entity_becomes_one_state_and_the_rest_stays(encoder):
    plain, bound = encoder.encode(PROMPTS), composite(encoder, PROMPTS, ENTITIES, 1.5, 0.5)
    torch.testing.assert_close(bound.states[0, 2], 1.5 * plain.states[0, 2] + 0.5 * plain.states[0, 1])
    torch.testing.assert_close(bound.states[0, 6], 1.5 * plain.states[0, 6] + 0.5 * plain.states[0, 5])
    torch.testing.assert_close(bound.states[1, 2], 1.5 * plain.states[1, 2] + 0.5 * plain.states[1, 1])
    untouched = [0, 3, 4, 7]
    assert torch.equal(bound.states[0, untouched], plain.states[0, untouched])
    # What became part of another state is not there any more.
    assert (plain.mask & ~bound.mask).nonzero().tolist() == [[0, 1], [0, 5], [1, 1]]
    assert torch.equal(bound.null().states, plain.null().states)


def test_a_word_of_several_tokens_is_one_noun(tmp_path):
    clip = build("text_encoders", Component("clip", {"path": str(save_clip(tmp_path / "clip"))}))
    noun = [place for place, (start, end) in enumerate(clip.spans(PROMPTS[0])) if 6 <= start < end <= 12]
    assert len(noun) == len("circle")
    plain, bound = clip.encode(PROMPTS[:1]), composite(clip, PROMPTS[:1], [[Entity("circle")]], 1.0)
    torch.testing.assert_close(bound.states[0, noun[0]], plain.states[0, noun].sum(0))
    assert bound.mask.sum() == plain.mask.sum() - len(noun) + 1


def test_words_read_alone_know_of_no_other_entity(t5, encoder):
    plain, alone = t5.encode(PROMPTS), uncontextualised(t5, PROMPTS, ENTITIES)
    spans = t5.spans(PROMPTS[0])
    of_items = [any(low <= start < end <= high for low, high in [(2, 12), (19, 30)]) for start, end in spans]
    changed = (plain.states[0, : len(spans)] != alone.states[0, : len(spans)]).any(1)
    assert changed.tolist() == of_items
    phrase = t5.encode(["a red circle"]).states[0]
    own = [place for place, (start, end) in enumerate(t5.spans("a red circle")) if 2 <= start < end]
    torch.testing.assert_close(alone.states[0, own], phrase[own])
    # Words that never knew of one another stay what they are.
    assert torch.equal(uncontextualised(encoder, PROMPTS, ENTITIES).states, encoder.encode(PROMPTS).states)


@pytest.mark.parametrize("condition", ["text_prefix", "text_cross"])
def test_states_that_a_generator_read_itself_can_be_edited(encoder, condition):
    text = {"condition": condition, "text_width": 64, "text_depth": 1, "text_positions": 12, "num_classes": 0}
    generator = make_generator("gpt", SPECS["grid"], **text)
    torch.nn.init.normal_(generator.adapter.head.weight)
    options, rng = SampleOptions(cfg_scale=2.0), partial(SampleRng.from_seed, 0, 2)
    plain = generator.generate(encoder.encode(PROMPTS), options, rng()).ids
    with reading_apart(generator, encoder) as reader:
        read = reader.encode(PROMPTS)
        assert torch.equal(generator.generate(read, options, rng()).ids, plain)
        alone = uncontextualised(reader, PROMPTS, ENTITIES)
        changed = (read.states != alone.states).any(-1) & read.mask
        # Only the words of entities among others; the star is alone but for the end of the text.
        assert changed[0].tolist() == [False, True, True, False, False, True, True, False]
        assert generator.generate(alone, options, rng()).ids.shape == plain.shape
    assert torch.equal(generator.generate(encoder.encode(PROMPTS), options, rng()).ids, plain)


def test_a_generator_of_classes_reads_no_text(encoder):
    with (
        pytest.raises(UserError, match="GPT reads no text"),
        reading_apart(make_generator("gpt", SPECS["grid"]), encoder),
    ):
        pass


def test_no_entities_change_nothing(encoder):
    plain = encoder.encode(PROMPTS)
    for edit in (composite, uncontextualised):
        assert torch.equal(edit(encoder, PROMPTS, [[], []]).states, plain.states)


@pytest.mark.parametrize("edit", [composite, uncontextualised])
@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([[Entity("cat")], []], "'cat' is not in the prompt"),
        ([[Entity("circle"), Entity("circle")], []], "once more"),
        ([[]], "1 rows of entities for 2 prompts"),
    ],
)
def test_bad_entities(encoder, edit, entities, message):
    with pytest.raises(UserError, match=message):
        edit(encoder, PROMPTS, entities)


def test_an_entity_that_was_cut_off_is_told(encoder):
    short = build("text_encoders", Component("bytes", {"width": 64, "max_length": 4}))
    with pytest.raises(UserError, match="'square' is beyond what the text encoder reads"), pytest.warns():
        composite(short, PROMPTS, ENTITIES)
