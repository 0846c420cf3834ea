import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vistok.errors import UserError
from vistok.merging.flops import count_macs
from vistok.merging.tome import ToMe
from vistok.merging.vit import apply, merge_tokens, remove
from vistok.nn.vision_teacher import make_tower

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True, "rope_type": "cat", "use_abs_pos_emb": False}
MAKERS = {
    "class token": lambda: VisionTransformer(**SIZES),
    "layer scale": lambda: VisionTransformer(**SIZES, init_values=0.1),
    "normalised keys": lambda: VisionTransformer(**SIZES, qk_norm=True, scale_attn_norm=True),
    "norms behind": lambda: VisionTransformer(**SIZES, block_fn=ResPostBlock),
    "registers": lambda: VisionTransformer(**SIZES, reg_tokens=4),
    "average pooling": lambda: VisionTransformer(**SIZES, class_token=False, global_pool="avg"),
    "pooled prefix": lambda: VisionTransformer(**SIZES, global_pool="avg", pool_include_prefix=True),
    "average and maximum": lambda: VisionTransformer(**SIZES, global_pool="avgmax"),
    "attention pooling": lambda: VisionTransformer(**SIZES, class_token=False, global_pool="map"),
    "differential": lambda: VisionTransformer(**SIZES, attn_layer="diff"),
    "rotary": lambda: Eva(**SIZES, **ROPE, num_reg_tokens=2, init_values=0.1),
    "rotary, norms behind": lambda: Eva(**SIZES, **ROPE, use_post_norm=True, swiglu_mlp=True),
    "rotary, by layer": lambda: Eva(**SIZES, **(ROPE | {"rope_type": "mixed"}), attn_type="rope", qk_norm=True),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZES),
}
"""What a block, the tokens in front of the patches, or the pooling can be like."""

FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_240",
    "vit_base_patch32_clip_224",
    "vit_small_patch16_36x1_224",
    "vit_little_patch16_reg4_gap_256",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "flexivit_small",
]


def randomised(model):
    """Weights that leave nothing near zero or one, where a part that is left out would not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.5
        nn.init.normal_(parameter, std=scale, generator=generator)
    return model.eval()


def images(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MAKERS)
def model(request):
    return randomised(MAKERS[request.param]())


@pytest.fixture(scope="module")
def plain():
    return randomised(MAKERS["class token"]())


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"method": "tome", "r": 0}, {"method": "pitome", "ratio": 1.0}], ids=str)
def test_no_merges_change_nothing(model, settings):
    expected, features = model(images()), model.forward_features(images())
    with merge_tokens(model, **settings) as merging:
        assert torch.equal(model(images()), expected) and torch.equal(model.forward_features(images()), features)
        assert merging.size is None and merging.lengths == [features.shape[1]] * 3
    assert torch.equal(model(images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pitome", "pitome_deit", "random"])
def test_merges_shorten_what_blocks_hand_on(model, method):
    expected = model(images())
    with merge_tokens(model, method, r=9) as merging:
        tokens = model.forward_features(images())
        prefix = model.num_prefix_tokens
        assert merging.lengths == [64 + prefix - 9 * count for count in (1, 2, 3)]
        assert tokens.shape == (2, merging.lengths[-1], 32) and merging.slots.shape == (2, 64 + prefix)
        assert (merging.size.sum(1) == 64 + prefix).all() and (merging.size[:, :prefix] == 1).all()
        counts = F.one_hot(merging.slots, tokens.shape[1]).sum(1)
        assert torch.equal(counts.float(), merging.size)
        assert not torch.allclose(model(images()), expected)
    assert torch.equal(model(images()), expected)


@pytest.mark.filterwarnings("ignore:block 0 was asked to merge 64")  # 128 patches come
@torch.no_grad()
def test_equal_tokens_merge_without_loss(model, monkeypatch):
    # Half of 128 tokens are copies. Their positions are equal too, so no answer may change when the copies merge:
    # attention, pooling and rotary tables must all count the tokens that are left for two.
    monkeypatch.setattr(model, "_pos_embed", doubled_patches(model))
    expected = model(images())
    with merge_tokens(model, r=[64]) as merging:
        answer = model(images())
        assert merging.lengths[-1] == 64 + model.num_prefix_tokens
        assert (merging.size[:, model.num_prefix_tokens :] == 2).all()
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


def doubled_patches(model):
    embed, prefix = model._pos_embed, model.num_prefix_tokens

    def doubled(x):
        x = embed(x)
        x, rope = x if isinstance(x, tuple) else (x, None)
        x = torch.cat([x[:, :prefix], x[:, prefix:].repeat_interleave(2, dim=1)], dim=1)
        return x if rope is None and not isinstance(model, Eva) else (x, rope.repeat_interleave(2, dim=-2))

    return doubled


@pytest.mark.filterwarnings("ignore:block 0 was asked to merge 64")
@torch.no_grad()
def test_sizes_count_in_attention(plain, monkeypatch):
    monkeypatch.setattr(plain, "_pos_embed", doubled_patches(plain))
    expected = plain(images())
    with merge_tokens(plain, r=[64], proportional=False):
        assert (plain(images()) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_unmerged_features_lie_on_the_grid(model):
    with merge_tokens(model, r=9) as merging:
        short = model.forward_features(images())
        pooled = model.forward_head(short)
        expected = merging.unmerge(short)
    with merge_tokens(model, r=9, unmerge=True):
        tokens = model.forward_features(images())
        torch.testing.assert_close(tokens, expected)
        torch.testing.assert_close(model.forward_head(tokens), pooled, atol=1e-4, rtol=1e-4)
    assert tokens.shape[1] == 64 + model.num_prefix_tokens


@torch.no_grad()
def test_intermediates_are_unmerged(model):
    with merge_tokens(model, r=9) as merging:
        final, maps = model.forward_intermediates(images())
        tokens = model.forward_features(images())
        torch.testing.assert_close(final, merging.unmerge(tokens))
        last = model.forward_intermediates(images(), indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    assert [tuple(m.shape) for m in maps] == [(2, 32, 8, 8)] * 3
    torch.testing.assert_close(last, final[:, model.num_prefix_tokens :])


def test_gradient_checkpointing_changes_no_gradient(model):
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with merge_tokens(model, r=9):
            first, second = model(images()), model(images().flip(0))  # two passes before the first backward
            model.zero_grad()
            (first.square().sum() + second.sum()).backward()
        assert model.grad_checkpointing is checkpointing
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    model.set_grad_checkpointing(False)
    assert len(gradients[0]) > 20
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_compiles_once_without_graph_breaks():
    model, x = randomised(MAKERS["rotary, by layer"]()), images()
    with merge_tokens(model, "pitome", r=9):
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x.flip(0)), expected.flip(0))


@torch.no_grad()
def test_autocast_and_half_precision(model):
    with merge_tokens(model, r=9) as merging:
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images()).isfinite().all() and merging.size.dtype == torch.float32
        half = copy.deepcopy(model).bfloat16()
        assert half(images().bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_copy_merges_by_itself(plain):
    expected = plain(images())
    with merge_tokens(plain, r=9):
        other = copy.deepcopy(plain)
        merged = plain(images())
    assert torch.equal(other(images()), merged) and torch.equal(plain(images()), expected)
    remove(other)
    assert torch.equal(other(images()), expected)


@torch.no_grad()
def test_applying_again_replaces_the_setting(plain):
    expected, keys = plain(images()), plain.state_dict().keys()
    apply(plain, "tome", r=4)
    merging = apply(plain, "pitome", ratio=0.5)
    plain(images())
    assert merging.lengths == [33, 17, 9] and plain.state_dict().keys() == keys
    remove(plain)
    remove(plain)
    assert torch.equal(plain(images()), expected)


@torch.no_grad()
def test_images_of_another_size():
    model = randomised(VisionTransformer(**SIZES, dynamic_img_size=True))
    with merge_tokens(model, ratio=0.5) as merging:
        assert merging.lengths == [33, 17, 9]
        model(images(16))
        assert merging.lengths == [9, 5, 3]


@torch.no_grad()
def test_merging_almost_everything(plain):
    with pytest.warns(UserWarning, match="block 0 was asked to merge 60 tokens and can merge 32"):
        merging = apply(plain, r=60)
    assert plain(images()).isfinite().all() and merging.lengths == [33, 17, 9]
    remove(plain)


TOWERS = {
    "clip": lambda: CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        )
    ),
    "siglip": lambda: SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=4,
        )
    ),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    return randomised(TOWERS[request.param]())


@torch.no_grad()
def test_towers_of_transformers(tower):
    expected = tower(images())
    prefix = int(isinstance(tower, CLIPVisionModel))
    with merge_tokens(tower, r=0):
        assert torch.equal(tower(images()).pooler_output, expected.pooler_output)
    with merge_tokens(tower, r=9) as merging:
        short = tower(images(), output_hidden_states=True)
        assert short.last_hidden_state.shape == (2, 64 + prefix - 27, 32) and merging.prefix == prefix
        assert short.hidden_states[1].shape[1] == merging.lengths[0]
    with merge_tokens(tower, r=9, unmerge=True):
        full = tower(images(), output_hidden_states=True)
    assert {state.shape for state in full.hidden_states} == {(2, 64 + prefix, 32)}
    # The head of SigLIP attends to all positions: that is what counting by size must amount to.
    torch.testing.assert_close(full.pooler_output, short.pooler_output, atol=1e-4, rtol=1e-4)
    assert torch.equal(tower(images()).last_hidden_state, expected.last_hidden_state)


def test_towers_of_transformers_with_gradient_checkpointing(tower):
    gradients = []
    tower.train()
    for checkpointing in (False, True):
        (tower.gradient_checkpointing_enable if checkpointing else tower.gradient_checkpointing_disable)()
        with merge_tokens(tower, r=9):
            tower.zero_grad()
            tower(images()).pooler_output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None])
    tower.gradient_checkpointing_disable()
    tower.eval()
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_timm(name):
    """No merges: bit for bit timm's own; some: as many tokens less, and the patch grid from intermediates."""
    patch = next(size for size in (14, 32, 16) if f"patch{size}" in name or size == 16)
    model = randomised(timm.create_model(name, depth=2, img_size=4 * patch, num_classes=5))
    x = images(4 * patch)
    expected = model(x)
    for settings in ({"r": 0}, {"method": "pitome", "ratio": 1.0}):
        with merge_tokens(model, **settings):
            assert torch.equal(model(x), expected)
    with merge_tokens(model, r=2) as merging:
        assert not torch.equal(model(x), expected)
        grid = model.patch_embed.grid_size
        assert merging.lengths[-1] == math.prod(grid) + model.num_prefix_tokens - 4
        assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[2:] == grid


@torch.no_grad()
def test_features_of_a_vision_tower():
    tower = make_tower("test_vit").eval()
    expected = tower(images(160))
    with merge_tokens(tower.model, r=1, unmerge=True) as merging:
        features = tower(images(160))
        layers = tower.with_layers(images(160))[1]
    assert merging.lengths[-1] == 95 and features.shape == expected.shape == (2, 10, 10, 64)
    assert [tuple(layer.shape) for layer in layers] == [(2, 100, 64)] * 6
    assert F.cosine_similarity(features, expected, dim=-1).mean() > 0.9 and not torch.equal(features, expected)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "vit_pwee_patch16_reg1_gap_256",
            r"blocks.0 \(ParallelScalingBlock\): it has none of attn, self_attn, attention",
        ),
        ("vit_small_patch16_18x2_224", r"blocks.0 \(ParallelThingsBlock\): it has none of attn, self_attn, attention"),
        ("beit_base_patch16_224", "tokens of Beit: it has no pool"),
        ("naflexvit_base_patch16_gap", "tokens of NaFlexVit: it has no patch_embed"),
        ("resnet18", "tokens of ResNet: it has neither blocks"),
    ],
)
def test_models_that_cannot_merge_are_refused_by_name(name, message):
    sizes = {} if name == "resnet18" else {"depth": 1}
    model = timm.create_model(name, **sizes)
    with pytest.raises(UserError, match=message):
        apply(model, r=8)
    assert not hasattr(model, "token_merging")


class Elsewhere(nn.Module):
    """A block with the right names; ``change`` makes it compute something else."""

    def __init__(self, change):
        super().__init__()
        block = VisionTransformer(**SIZES).blocks[0]
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.change = change

    def forward(self, x, attn_mask=None):
        y = self.attn(self.norm1(x), attn_mask)
        if self.change == "positions":
            y = y * torch.arange(1.0, 1 + y.shape[1])[:, None]
        x = x + y
        return x + self.mlp(self.norm2(x)) * (2 if self.change == "factor" else 1)


class DeafAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention, self.k_norm = attention, attention.k_norm

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.attention(x)


def test_blocks_are_tried_out():
    model = VisionTransformer(**SIZES)
    model.blocks[1] = Elsewhere("none")
    remove(apply(model, r=4) and model)
    for change in ("positions", "factor"):
        model.blocks[1] = Elsewhere(change)
        with pytest.raises(
            UserError, match=r"blocks.1 \(Elsewhere\): it is not attention and MLP, one after the other"
        ):
            apply(model, r=4)
    model.blocks[1] = VisionTransformer(**SIZES).blocks[0]
    model.blocks[1].attn = DeafAttention(model.blocks[1].attn)
    with pytest.raises(UserError, match=r"blocks.1 \(Block\): in its attention, a token of size 2 does not act as two"):
        apply(model, r=4)


@torch.no_grad()
def test_masks_are_refused(plain):
    with merge_tokens(plain, r=4):
        for masked in ({"attn_mask": torch.zeros(65, 65)}, {"is_causal": True}):
            with pytest.raises(UserError, match=r"blocks.0: attention masks do not go together with token merging"):
                plain(images(), **masked)


def test_unknown_methods_and_bad_settings(plain):
    with pytest.raises(UserError, match="no merging method 'tom': choose from tome, pitome"):
        apply(plain, "tom", r=4)
    with pytest.raises(UserError, match="ratio must lie in"):
        apply(plain, ratio=0)
    with pytest.raises(UserError, match="r lists 4 blocks, the model has 3"):
        apply(plain, r=[1, 1, 1, 1])
    assert not hasattr(plain, "token_merging") and "forward" not in vars(plain.blocks[0])


@torch.no_grad()
def test_a_method_of_ones_own(plain):
    with merge_tokens(plain, ToMe(in_order=False), r=[8, 0, 8]) as merging:
        plain(images())
        assert merging.lengths == [57, 57, 49]


def test_macs_know_both_lengths(plain):
    def blocks(lengths):
        # Projections and attention at the length before the merge, the MLP (four times as wide) at the one behind it.
        attention = sum(4 * n * 32 * 32 + 2 * n * n * 32 for n in (65, *lengths[:-1]))
        return attention + sum(8 * m * 32 * 32 for m in lengths)

    ends = 64 * 48 * 32 + 32 * 5  # patches in, classes out
    x = images(count=1)
    assert count_macs(plain, x) == blocks([65] * 3) + ends
    with merge_tokens(plain, r=9):
        similarities = sum(a * b * 16 for a, b in ((32, 32), (28, 27), (23, 23)))
        assert count_macs(plain, x) == blocks([56, 47, 38]) + ends + similarities
