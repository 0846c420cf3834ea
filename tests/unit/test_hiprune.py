import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vistok.errors import UserError
from vistok.merging.hiprune import HiPrune, num_anchors, received_attention, select, with_neighbours

IMAGE, PAD = 30, 0
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
LM = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
CELLS = 36  # a LLaVA tile is 6 x 6
QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [0, 2],
    "out_hidden_size": 24,
}


def text(*words):
    return [3 + word for word in words]


def llava(prompts, seed=0):
    """A tiny LLaVA and its inputs: for each prompt the words before and after each image."""
    config = LlavaConfig(vision_config=CLIP, text_config={"model_type": "llama", **LM}, image_token_id=IMAGE)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    rng = torch.Generator().manual_seed(seed)
    images = sum(part is None for prompt in prompts for part in prompt)
    inputs = {"pixel_values": torch.randn(images, 3, 24, 24, generator=rng)}
    return model, inputs | padded(prompts, [CELLS] * images)


def llava_next(prompts, seed=0):
    sizes = {"image_grid_pinpoints": [[24, 48], [48, 24]], "image_token_id": IMAGE}
    config = LlavaNextConfig(vision_config=CLIP, text_config={"model_type": "llama", **LM}, **sizes)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    rng = torch.Generator().manual_seed(seed)
    images = sum(part is None for prompt in prompts for part in prompt)
    # 24 x 40 pixels are fitted into 24 x 48: two tiles and the overview, one column of each side is padding.
    inputs = {
        "pixel_values": torch.randn(images, 3, 3, 24, 24, generator=rng),
        "image_sizes": torch.tensor([[24, 40]] * images),
    }
    return model, inputs | padded(prompts, [CELLS + 6 * (10 + 1)] * images)


def qwen(prompts, seed=0):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    config = Qwen2_5_VLConfig(
        vision_config=QWEN_TOWER, text_config={**LM, "rope_parameters": rope}, image_token_id=IMAGE
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    rng = torch.Generator().manual_seed(seed)
    images = sum(part is None for prompt in prompts for part in prompt)
    grids = torch.tensor([[1, 8, 12], [1, 12, 8], [1, 6, 10]][:images])
    inputs = {"pixel_values": torch.randn(int(grids.prod(1).sum()), 1176, generator=rng), "image_grid_thw": grids}
    inputs |= padded(prompts, (grids.prod(1) // 4).tolist())
    return model, inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


def padded(prompts, lengths):
    """Ids and mask, padded on the left; None in a prompt is the next image."""
    lengths = iter(lengths)
    rows = []
    for prompt in prompts:
        rows.append([token for part in prompt for token in ([IMAGE] * next(lengths) if part is None else part)])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


FAMILIES = pytest.mark.parametrize("build", [llava, llava_next, qwen])
ONE = [[text(1, 2), None, text(3, 4, 5)]]
TWO = [[text(1, 2), None, text(3, 4, 5)], [text(6), None, text(7, 8), None, text(9, 10, 11)]]


# ---------------------------------------------------------------------- the selection


def random_scores(count=3, cells=48, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(2, count, cells, generator=rng).unbind(0)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 7, 24, 48])
@pytest.mark.parametrize("compat", [False, True])
def test_exactly_the_budget_is_kept(alpha, budget, compat):
    mask = select(*random_scores(), (6, 8), budget, alpha, compat)
    assert mask.sum(1).tolist() == [budget] * 3


def test_anchors_come_first_then_their_neighbours_then_the_deep_layer():
    objects, deep = (torch.zeros(1, 48) for _ in range(2))
    objects[0, 19] = 1.0  # row 2, column 3
    deep[0, [0, 47, 46]] = torch.tensor([3.0, 2.0, 1.0])
    mask = select(objects, deep, (6, 8), 7, alpha=5 / 7)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 11, 18, 19, 20, 27, 47]


def test_the_neighbourhood_ends_with_the_row_and_runs_on_in_the_published_mode():
    anchors = torch.tensor([[8, 47]])  # the first of row 1, the last of all
    assert with_neighbours(anchors, (6, 8)).nonzero()[:, 1].tolist() == [0, 8, 9, 16, 39, 46, 47]
    assert with_neighbours(anchors, (6, 8), compat=True).nonzero()[:, 1].tolist() == [0, 7, 8, 9, 16, 39, 46, 47]
    assert with_neighbours(torch.tensor([[3]]), (6, 8), compat=True)[0, 0]


def test_published_numbers_of_anchors():
    assert [num_anchors(budget, 0.1) for budget in (192, 128, 64, 20)] == [4, 3, 1, 0]


def test_what_is_not_shown_is_not_kept():
    shown = torch.arange(48) % 8 < 3
    objects, deep = random_scores(1)
    objects[0, 5] = 2.0
    mask = select(objects, deep, (6, 8), 10, 0.5, shown=shown[None])
    assert int(mask.sum()) == 10 and not (mask & ~shown).any()
    assert torch.equal(select(objects, deep, (6, 8), 30, 0.5, shown=shown[None])[0], shown)


def test_rows_of_a_batch_do_not_see_each_other():
    objects, deep = random_scores()
    together = select(objects, deep, (6, 8), 11, 0.5)
    alone = [select(objects[[row]], deep[[row]], (6, 8), 11, 0.5) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_received_attention_is_the_column_sum_of_the_maps():
    q, k = torch.randn(2, 2, 3, 300, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    maps = (q @ k.mT * 0.3).softmax(-1)
    torch.testing.assert_close(received_attention(q, k, 0.3), maps.mean(1).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (6, 7)}, "grid of 6x7"),
        ({"budget": 49}, "0 to 48 tokens"),
        ({"alpha": 1.5}, "alpha must be in"),
    ],
)
def test_bad_selections(change, message):
    objects, deep = random_scores()
    with pytest.raises(UserError, match=message):
        select(objects, deep, **{"grid": (6, 8), "budget": 8, **change})


# ---------------------------------------------------------------------- the models


@FAMILIES
@torch.no_grad()
def test_nothing_changes_while_every_token_is_kept(build):
    model, inputs = build(TWO)
    plain = model(**inputs).logits
    with HiPrune(model, budget=1.0) as pruning:
        kept = model(**inputs).logits
    # LLaVA-NeXT's newline tokens go even so.
    if build is not llava_next:
        assert all(mask.all() for mask in pruning.masks)
        torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(**inputs).logits, plain)


@FAMILIES
@torch.no_grad()
def test_the_language_model_reads_the_kept_tokens_at_their_positions(build):
    model, inputs = build(ONE)
    calls = []
    reader = model.model.language_model
    with HiPrune(model, budget=9) as pruning:
        reader.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
        logits = model(**inputs).logits
    plain = model(**inputs)
    before, after = calls[0], calls[1]
    keep = torch.ones_like(inputs["input_ids"][0]).bool()
    keep[inputs["input_ids"][0] == IMAGE] = pruning.masks[0]
    assert int(pruning.masks[0].sum()) == 9
    assert torch.equal(before["inputs_embeds"], after["inputs_embeds"][:, keep])
    positions = after.get("position_ids")
    positions = torch.arange(len(keep))[None] if positions is None else positions
    assert torch.equal(before["position_ids"], positions[..., keep])
    assert logits.shape[1] == 5 + 9 and plain.logits.shape[1] == len(keep)


@FAMILIES
@pytest.mark.parametrize("positions", ["keep", "repack"])
@torch.no_grad()
def test_generating_with_a_cache_continues_as_without(build, positions):
    model, inputs = build(TWO)
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "suppress_tokens": [IMAGE, PAD]}
    with HiPrune(model, budget=[4, 9, 6], positions=positions):
        cached = model.generate(**inputs, **options, max_new_tokens=5)
        plain = model.generate(**inputs, **options, max_new_tokens=5, use_cache=False)
        beams = model.generate(**inputs, **options, max_new_tokens=3, num_beams=2)
    assert torch.equal(cached, plain) and cached.shape[1] == length + 5
    assert beams.shape == (2, length + 3)


@FAMILIES
@torch.no_grad()
def test_repacked_positions_have_no_gaps(build):
    model, inputs = build(ONE)
    calls = []
    with HiPrune(model, budget=9, positions="repack"):
        model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["position_ids"]), with_kwargs=True
        )
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert [call.tolist() for call in calls] == [[list(range(14))], [[14]], [[15]]]


@FAMILIES
@torch.no_grad()
def test_a_prompt_is_answered_alike_alone_and_in_a_batch(build):
    model, inputs = build(TWO)
    alone_model, alone = build(ONE)
    pixels = inputs["pixel_values"]
    alone["pixel_values"] = pixels[: len(alone["pixel_values"])]
    with HiPrune(model, budget=[4, 9, 6]) as together, HiPrune(alone_model, budget=4) as single:
        logits = model(**inputs).logits[0]
        expected = alone_model(**alone).logits[0]
    assert torch.equal(together.masks[0], single.masks[0])
    torch.testing.assert_close(logits[-len(expected) :], expected, rtol=1e-4, atol=1e-5)


@FAMILIES
@torch.no_grad()
def test_eager_attention_selects_the_same_tokens(build):
    masks = []
    for implementation in ("eager", "sdpa"):
        model, inputs = build(TWO)
        model.set_attn_implementation(implementation)
        with HiPrune(model, budget=0.25) as pruning:
            model(**inputs)
        masks.append(torch.cat(pruning.masks))
    assert torch.equal(*masks) and 0 < int(masks[0].sum()) < len(masks[0]) / 3


@FAMILIES
@torch.no_grad()
def test_the_random_baseline_looks_at_nothing(build):
    masks = []
    for seed, pixels in ((1, 0), (1, 1), (2, 0)):
        model, inputs = build(ONE, seed=pixels)
        with HiPrune(model, budget=9, random_seed=seed) as pruning:
            model(**inputs)
        masks.append(pruning.masks[0])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert {int(mask.sum()) for mask in masks} == {9}


@torch.no_grad()
def test_the_budget_of_llava_next_goes_to_what_is_shown():
    model, inputs = llava_next(ONE)
    with HiPrune(model, budget=40) as pruning:
        model(**inputs)
    overview, lines = pruning.masks[0].split([CELLS, 6 * 11])
    newlines = lines.view(6, 11)[:, -1]
    assert int(overview.sum()) == 14 and int(lines.sum()) == 26 and not newlines.any()


@FAMILIES
@torch.no_grad()
def test_a_prompt_without_images_is_left_alone(build):
    model, inputs = build(ONE)
    words = {"input_ids": torch.tensor([text(1, 2, 3)])}
    plain = model(**words).logits
    with HiPrune(model, budget=4):
        model(**inputs)
        assert torch.equal(model(**words).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget must be"),
        ({"budget": 1.5}, "share in"),
        ({"alpha": -0.1}, "alpha must be in"),
        ({"object_layer": 5}, "object_layer must be 1 to 4, got 5"),
        ({"positions": "pack"}, "keep or repack"),
    ],
)
def test_bad_settings(settings, message):
    model, _ = llava(ONE)
    with pytest.raises(UserError, match=message):
        HiPrune(model, **{"budget": 4, **settings})


def test_refusals():
    model, inputs = llava(ONE)
    with HiPrune(model, budget=4), pytest.raises(UserError, match="pruned already"):
        HiPrune(model, budget=4)
    with HiPrune(model, budget=[4, 4]), pytest.raises(UserError, match="2 budgets for 1 images"):
        model(**inputs)
    with pytest.raises(UserError, match="not Linear"):
        HiPrune(torch.nn.Linear(2, 2), budget=4)
    with pytest.raises(UserError, match="attends within windows; full attention: 1, 3"):
        HiPrune(qwen(ONE)[0], budget=4, object_layer=2)
