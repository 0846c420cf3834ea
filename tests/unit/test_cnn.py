"""The convolutional autoencoder outside its parity cases: sizes, and what a position can see."""

import pytest
import torch
import torch.nn.functional as F

from vistok.nn.cnn import CNNDecoder, CNNEncoder, Downsample, SpatialAttention, Upsample


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("multipliers", "blocks", "size"), [((1,), 1, (6, 6)), ((1, 2), 2, (8, 12)), ((2, 1, 3), 1, (20, 4))]
)
def test_a_map_is_smaller_by_two_for_every_level_but_one_and_comes_back(multipliers, blocks, size):
    encoder = CNNEncoder(3, 5, 8, multipliers, blocks, groups=4)
    decoder = CNNDecoder(5, 2, 8, multipliers, blocks + 1, groups=4)
    images = noise(2, 3, *size)
    h = encoder(images)
    factor = 2 ** (len(multipliers) - 1)
    assert h.shape == (2, 5, size[0] // factor, size[1] // factor)
    assert decoder(h).shape == (2, 2, *size)
    assert decoder.conv_out.weight.shape == (2, 8 * multipliers[0], 3, 3)


def test_levels_have_their_channels_blocks_and_attention():
    encoder = CNNEncoder(3, 5, 8, (1, 2, 4), 2, groups=4)
    decoder = CNNDecoder(5, 3, 8, (1, 2, 4), 3, groups=4)
    channels = [[block.conv2.out_channels for block in level.res] for level in encoder.levels]
    assert channels == [[8, 8], [16, 16], [32, 32]]
    channels = [[block.conv2.out_channels for block in level.res] for level in decoder.levels]
    assert channels == [[32, 32, 32], [16, 16, 16], [8, 8, 8]]
    assert [len(level.attention) for level in encoder.levels] == [0, 0, 2]
    assert [len(level.attention) for level in decoder.levels] == [3, 0, 0]


def test_attention_is_the_weighted_mean_of_values_around_a_shortcut():
    attention, x = SpatialAttention(8, 4), noise(2, 8, 3, 5)
    q, k, v = attention.qkv(F.group_norm(x, 4, attention.norm.weight, attention.norm.bias, 1e-6)).chunk(3, dim=1)
    weights = torch.einsum("bchw,bcij->bhwij", q, k).div(8**0.5).flatten(3).softmax(-1)
    mean = torch.einsum("bhwn,bcn->bchw", weights, v.flatten(2))
    torch.testing.assert_close(attention(x), x + attention.out(mean))


def test_a_step_down_pads_below_and_right_only():
    down, x = Downsample(1), torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        down.weight.fill_(1.0)
        down.bias.zero_()
        x[..., 0, 0], x[..., 3, 3] = 1.0, 10.0
        assert down(x)[0, 0].tolist() == [[1.0, 0.0], [0.0, 10.0]]


def test_a_step_up_repeats_values():
    up, x = Upsample(1), noise(1, 1, 2, 3)
    with torch.no_grad():
        up.weight.zero_()
        up.bias.zero_()
        up.weight[0, 0, 1, 1] = 1.0
        assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
