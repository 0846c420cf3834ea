import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tiny_models.sdxl import clip_tokenizer, flux, sdxl
from vistok.errors import UserError
from vistok.merging.entities import Entity, align_item, find_groups, num_tokens, parse, phrases_of
from vistok.merging.flux import edited_states
from vistok.merging.sdxl import OFF, Controls, SemanticBinding
from vistok.merging.semantic_binding import (
    Group,
    binding_loss,
    centroids,
    check_groups,
    entropy_loss,
    merge_groups,
    noun_distributions,
    patch,
    substitute_end,
    swap_item,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- functions on tensors


def test_a_group_becomes_one_token_and_the_rest_stays():
    states = randn(12, 8)
    merged = merge_groups(states, [Group((3, 4), (2,)), Group((7,))])
    torch.testing.assert_close(merged[3], 1.1 * (states[3] + states[4]) + 1.2 * states[2])
    torch.testing.assert_close(merged[7], 1.1 * states[7])
    assert not merged[[2, 4]].any()
    others = [0, 1, 5, 6, 8, 9, 10, 11]
    assert torch.equal(merged[others], states[others])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group((2,), (3,)), Group((3,))], "position 3 is in two groups"),
        ([Group((9,))], "position 9 is outside the prompt's 1 to 8"),
        ([Group((0,))], "position 0 is outside"),
        ([Group(())], "needs the position of a noun"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(UserError, match=message):
        check_groups(groups, 8)


def test_only_what_is_behind_the_prompt_is_substituted():
    states, clean = randn(2, 2, 12, 4).unbind(0)
    result = substitute_end(states, clean, 5)
    assert torch.equal(result[:, :6], states[:, :6]) and torch.equal(result[:, 6:], clean[:, 6:])
    assert torch.equal(substitute_end(result, clean, 5), result)


def test_the_entropy_loss_is_zero_for_points_and_largest_for_constant_maps():
    flat = torch.full((1024, 10), 0.1, requires_grad=True)
    loss = entropy_loss(noun_distributions(flat, [2, 5], 8))
    (gradient,) = torch.autograd.grad(loss, flat)
    assert loss.item() == pytest.approx(4 * math.log(1024), abs=0.05) and gradient.isfinite().all()
    point = torch.zeros(1024, 10)
    point[:, 2][7] = 1.0
    assert entropy_loss(noun_distributions(point, [2], 8)).item() == pytest.approx(0, abs=0.05)


def test_the_distributions_know_no_scale_and_no_end_of_text():
    maps = torch.rand(64, 10, generator=torch.Generator().manual_seed(0))
    other = maps.clone()
    other[:, [0, 9]] = 5.0
    assert torch.equal(noun_distributions(maps, [2, 5], 8), noun_distributions(other, [2, 5], 8))
    assert noun_distributions(maps, [2, 5], 8).sum(1).tolist() == pytest.approx([1, 1])


def test_centroids():
    point = torch.zeros(2, 32, 32)
    point[0, 5, 20] = 1
    point[1] = 1 / 1024
    found = centroids(point.flatten(1), (32, 32))
    torch.testing.assert_close(found, torch.tensor([[20 / 31 * 32, 5 / 31 * 32], [16.0, 16.0]]), rtol=1e-4, atol=1e-4)
    wide = centroids(torch.eye(8)[[7]], (2, 4))
    assert wide.tolist() == [[32, 32]]


def test_the_binding_loss_is_of_each_entity():
    noise = randn(3, 4, 5, 5)
    shifted = noise + torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    torch.testing.assert_close(binding_loss(noise, shifted), torch.tensor([0.0, 1.0, 4.0]))


def test_patching_with_all_or_none():
    states, empty = randn(2, 6, 4), randn(1, 6, 4, seed=1)
    assert torch.equal(patch(states, empty, range(6)), states)
    assert torch.equal(patch(states, empty, []), empty.expand(2, -1, -1))
    some = patch(states, empty, [1, 4])
    assert torch.equal(some[:, [1, 4]], states[:, [1, 4]]) and torch.equal(
        some[:, [0, 2]], empty[:, [0, 2]].expand(2, -1, -1)
    )
    with pytest.raises(UserError, match="position 6 is outside 0 to 5"):
        patch(states, empty, [6])
    with pytest.raises(UserError, match="differ"):
        patch(states, empty[:, :5], [1])


def test_a_swap_touches_the_item_alone():
    states, alone = randn(6, 4), randn(3, 4, seed=1)
    swapped = swap_item(states, alone, [2, 3], [0, 1])
    assert torch.equal(swapped[2:4], alone[:2]) and torch.equal(swapped[[0, 1, 4, 5]], states[[0, 1, 4, 5]])
    assert torch.equal(swap_item(states, states, [2, 3], [2, 3]), states)
    with pytest.raises(UserError, match="2 tokens in the prompt but 1 alone"):
        swap_item(states, alone, [2, 3], [0])
    with pytest.raises(UserError, match="position 3 is outside the 3 rows of the item"):
        swap_item(states, alone, [2], [3])


# ---------------------------------------------------------------------- words and their tokens

PROMPT = "a white cat wearing sunglasses and a black dog"


def test_words_are_found_with_all_their_tokens():
    tokenizer = clip_tokenizer()
    assert num_tokens(tokenizer, PROMPT) == 10
    entities = [Entity("cat", ("white", "wearing sunglasses")), Entity("dog", ("black",))]
    assert find_groups(tokenizer, PROMPT, entities) == [Group((3,), (2, 4, 5, 6)), Group((10,), (9,))]
    assert phrases_of(PROMPT, entities) == ["a white cat wearing sunglasses", "a black dog"]
    assert phrases_of(PROMPT, [replace(entities[0], phrase="cats")]) == ["cats"]
    given = Group((1,))
    assert find_groups(tokenizer, PROMPT, [replace(entities[0], group=given)]) == [given]
    with pytest.raises(UserError, match="'hat' is not in the prompt"):
        find_groups(tokenizer, PROMPT, [Entity("hat")])
    with pytest.raises(UserError, match="'ca' is not in the prompt"):
        find_groups(tokenizer, PROMPT, [Entity("ca")])


def test_a_word_said_twice_belongs_to_the_nearest_noun():
    tokenizer, prompt = clip_tokenizer(), "a red hat on a red cat"
    hat, cat = Entity("hat", ("red",)), Entity("cat", ("red",))
    assert find_groups(tokenizer, prompt, [hat, cat]) == [Group((3,), (2,)), Group((7,), (6,))]
    assert find_groups(tokenizer, prompt, [cat, hat]) == [Group((7,), (6,)), Group((3,), (2,))]
    with pytest.raises(UserError, match="'red' is not in the prompt"):
        find_groups(tokenizer, prompt, [hat, Entity("cat", ("red", "red"))])


def test_items_are_aligned_by_their_tokens_or_refused():
    tokenizer = clip_tokenizer()
    assert align_item(tokenizer, PROMPT, "sunglasses") == ((5, 6), (1, 2))
    assert align_item(tokenizer, PROMPT, "dog", "a red dog") == ((10,), (3,))
    with pytest.raises(UserError, match="is not in the prompt 'a cat'"):
        align_item(tokenizer, PROMPT, "dog", "a cat")
    by_spaces = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    by_spaces.pre_tokenizer = WhitespaceSplit()
    with pytest.raises(UserError, match="'cat' is not a whole number of tokens in 'a cat-dog'"):
        align_item(PreTrainedTokenizerFast(tokenizer_object=by_spaces), "a cat-dog", "cat")
    # A mention in other letters is the same for the eye but not for a tokenizer that minds them.
    t5 = flux().tokenizer_2
    with pytest.raises(UserError, match="'dog' has other tokens in 'a Dog' than in 'dog'"):
        align_item(t5, "a Dog", "dog")
    with pytest.raises(UserError, match="use its fast version"):
        find_groups(object(), PROMPT, [Entity("cat")])


@dataclass(eq=False)
class Word:
    """A word as spaCy shows it."""

    text: str
    dep_: str
    pos_: str
    head: int
    i: int = 0
    idx: int = 0
    children: list = field(default_factory=list)


def parsed(*words):
    """Stands for a dependency parser: words as (text, dependency, part of speech, index of the head)."""
    words = [Word(*word) for word in words]
    start = 0
    for index, word in enumerate(words):
        word.i, word.idx = index, start
        start += len(word.text) + 1
        if word.head != index:
            words[word.head].children.append(word)
    return " ".join(word.text for word in words), lambda text: words


def test_entities_are_read_off_a_parse():
    prompt, nlp = parsed(
        ("a", "det", "DET", 2),
        ("white", "amod", "ADJ", 2),
        ("cat", "ROOT", "NOUN", 2),
        ("wearing", "acl", "VERB", 2),
        ("red", "amod", "ADJ", 5),
        ("sunglasses", "dobj", "NOUN", 3),
        ("and", "cc", "CCONJ", 2),
        ("a", "det", "DET", 8),
        ("dog", "conj", "NOUN", 2),
        ("with", "prep", "ADP", 8),
        ("a", "det", "DET", 11),
        ("hat", "pobj", "NOUN", 9),
        ("next", "advmod", "ADV", 2),
        ("to", "prep", "ADP", 12),
        ("two", "nummod", "NUM", 15),
        ("chairs", "pobj", "NOUN", 13),
        ("that", "nsubj", "PRON", 17),
        ("are", "relcl", "AUX", 15),
        ("very", "advmod", "ADV", 19),
        ("old", "acomp", "ADJ", 17),
        ("on", "prep", "ADP", 2),
        ("grass", "pobj", "NOUN", 20),
    )
    assert parse(prompt, nlp) == [
        Entity("cat", ("white", "wearing", "red", "sunglasses"), "a white cat wearing red sunglasses"),
        Entity("dog", ("hat",), "a dog with a hat"),
        Entity("chairs", ("two", "very", "old"), "two chairs that are very old"),
    ]


# ---------------------------------------------------------------------- on SDXL

PROMPTS = ["a white cat and a black dog", "a dog wearing hat"]
ENTITIES = [[Entity("cat", ("white",)), Entity("dog", ("black",))], [Entity("dog", ("hat",))]]
SIZE = {"height": 64, "width": 64, "output_type": "np"}
SHORT = Controls(binding_steps=1, entropy_steps=1, end_token_step=0)


@pytest.fixture(scope="module")
def pipe():
    return sdxl()


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_with_every_control_off_the_pipeline_is_as_ever(pipe, guidance_scale):
    options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, **SIZE}
    stock = pipe(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **options).images
    ours = SemanticBinding(pipe, OFF)(PROMPTS, ENTITIES, [3, 4], **options).images
    assert (ours == stock).all()
    controlled = SemanticBinding(pipe, SHORT)(PROMPTS, ENTITIES, [3, 4], **options).images
    assert (controlled != stock).any()
    # Nothing of a run stays behind.
    again = pipe(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], **options).images
    assert (again == stock).all() and all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_both_losses_fall_within_the_iterations_of_a_step(pipe):
    binding = SemanticBinding(pipe, Controls(binding_steps=2, entropy_steps=2, thresholds=(0,)))
    binding(PROMPTS, ENTITIES, [3, 4], num_inference_steps=3, **SIZE)
    assert len(binding.log.binding) == len(binding.log.entropy) == 2
    for losses in binding.log.binding:
        assert (torch.stack(losses).diff(dim=0) < 0).all() and len(losses) == 3
    for step in binding.log.entropy:
        assert [len(row) for row in step] == [4, 4]
        assert all(row[-1] < row[0] for row in step)


def test_a_prompt_gives_the_same_image_alone_and_in_a_batch(pipe):
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 3, **SIZE}
    binding = SemanticBinding(pipe, replace(SHORT, binding_steps=2))
    together = binding(PROMPTS, ENTITIES, [3, 4], **options).images
    entropy = binding.log.entropy
    alone = binding(PROMPTS[1:], ENTITIES[1:], [4], **options).images
    assert binding.log.entropy[0][0] == pytest.approx(entropy[0][1], rel=1e-4)
    assert abs(together[1] - alone[0]).max() < 1e-3 < abs(together[0] - alone[0]).max()


def test_each_prompt_stops_by_itself_below_its_threshold(pipe):
    # Two entities start at about 16, one at about 8, and the limit for the one is half of that for the two, less one.
    first = SemanticBinding(pipe, replace(SHORT, thresholds=(0,)))
    first(PROMPTS, ENTITIES, [3, 4], num_inference_steps=2, **SIZE)
    start = [row[0] for row in first.log.entropy[0]]
    scale = math.log(1024) / math.log(64)
    limit = (start[1] - 0.01) * scale + 2
    binding = SemanticBinding(pipe, replace(SHORT, thresholds=(2 * limit,)))
    binding(PROMPTS, ENTITIES, [3, 4], num_inference_steps=2, **SIZE)
    counts = [len(row) for row in binding.log.entropy[0]]
    assert binding.log.entropy[0][0][0] == start[0] and counts[0] == 1 < counts[1]


def test_only_the_composite_tokens_move_unless_the_published_code_is_followed(pipe):
    changed = {}
    for compat in (False, True):
        binding = SemanticBinding(pipe, replace(SHORT, end_token_step=None, compat=compat))
        binding([PROMPTS[0]], [ENTITIES[0]], [3], num_inference_steps=2, **SIZE)
        states = pipe.encode_prompt([PROMPTS[0]], do_classifier_free_guidance=False)[0][0]
        merged = merge_groups(states, find_groups(pipe.tokenizer, PROMPTS[0], ENTITIES[0]))
        changed[compat] = (binding.context[0] != merged).any(1).nonzero()[:, 0].tolist()
    assert changed == {False: [3, 7], True: list(range(16))}


def test_the_end_tokens_come_from_the_clean_prompt(pipe):
    controls = replace(OFF, end_token_step=1)
    reads = []
    handle = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: reads.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    SemanticBinding(pipe, controls)(PROMPTS, ENTITIES, [3, 4], num_inference_steps=2, **SIZE)
    handle.remove()
    clean = pipe.encode_prompt(["a cat and a dog", "a dog"], do_classifier_free_guidance=False)[0]
    assert torch.equal(reads[1][:2], reads[0][:2])
    for row, tokens in ((0, 7), (1, 4)):
        before, after = (read[2 + row] for read in reads)
        assert torch.equal(after[: tokens + 1], before[: tokens + 1])
        assert torch.equal(after[tokens + 1 :], clean[row, tokens + 1 :]) and (after != before).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": ENTITIES[:1]}, "1 entities for 2 prompts"),
        ({"seeds": [1]}, "1 seeds for 2 prompts"),
        ({"entities": [ENTITIES[0], [Entity("dog"), Entity("hat", group=Group((2,)))]]}, "position 2 is in two groups"),
        ({"entities": [ENTITIES[0], [Entity("dog", group=Group((9,)))]]}, "position 9 is outside the prompt's 1 to 4"),
        ({"entities": [ENTITIES[0], []]}, "every prompt needs an entity"),
        (
            {"latents": torch.zeros(2, 4, 16, 16)},
            r"latents must be \(2, 4, 32, 32\) for this size, got \(2, 4, 16, 16\)",
        ),
        ({"num_images_per_prompt": 2}, "instead of num_images_per_prompt"),
    ],
)
def test_bad_runs(pipe, change, message):
    arguments = {"prompts": PROMPTS, "entities": ENTITIES, "seeds": [3, 4], **SIZE, **change}
    with pytest.raises(UserError, match=message):
        SemanticBinding(pipe)(**arguments)


def test_other_pipelines_are_refused(pipe):
    with pytest.raises(UserError, match="needs a pipeline of SDXL, got object"):
        SemanticBinding(object())
    with pytest.raises(UserError, match="no attention layer mid_block"):
        SemanticBinding(pipe, Controls(map_layers=("mid_block.attn2",)))
    with pytest.raises(UserError, match="a layout of 2 places for 1 entities"):
        SemanticBinding(pipe, Controls(layout=((10, 16), (25, 16))))(PROMPTS, ENTITIES, [3, 4], **SIZE)


# ---------------------------------------------------------------------- on Flux


def test_flux_reads_edited_states():
    pipe = flux()
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "max_sequence_length": 16}
    prompt = "a red cat and a black dog"

    def image(**inputs):
        return pipe(**inputs, **options, generator=torch.Generator().manual_seed(0)).images

    plain = edited_states(pipe, [prompt], max_sequence_length=16)
    assert (image(**plain) == image(prompt=prompt)).all()
    empty = pipe.encode_prompt("", None, max_sequence_length=16)[0]
    kept = edited_states(pipe, [prompt], keep=[["dog", 0]], max_sequence_length=16)["prompt_embeds"]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kept[0, [0, 6]], plain["prompt_embeds"][0, [0, 6]], **close)
    others = [position for position in range(16) if position not in (0, 6)]
    torch.testing.assert_close(kept[0, others], empty[0, others], **close)
    assert (kept[0, others] - plain["prompt_embeds"][0, others]).abs().amax(1).min() > 0.01
    alone = edited_states(pipe, [prompt, prompt], isolate=[["dog"], []], max_sequence_length=16)
    dog = pipe.encode_prompt("dog", None, max_sequence_length=16)[0]
    states = alone["prompt_embeds"]
    torch.testing.assert_close(states[0, 6], dog[0, 0], **close)
    torch.testing.assert_close(states[0, :6], plain["prompt_embeds"][0, :6], **close)
    torch.testing.assert_close(states[1], plain["prompt_embeds"][0], **close)
    assert (states[0, 6] - states[1, 6]).abs().max() > 0.01
    assert (image(**{name: value[:1] for name, value in alone.items()}) != image(**plain)).any()
    with pytest.raises(UserError, match="'hat' is not in the prompt"):
        edited_states(pipe, [prompt], isolate=[["hat"]], max_sequence_length=16)
    with pytest.raises(UserError, match="2 rows of keep for 1 prompts"):
        edited_states(pipe, [prompt], keep=[[], []])
    with pytest.raises(UserError, match="needs a pipeline of Flux"):
        edited_states(object(), [prompt])
