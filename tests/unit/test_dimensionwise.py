import pytest
import torch
from torch.overrides import TorchFunctionMode

from vistok.errors import UserError
from vistok.quantizers.dimensionwise import (
    KL16_ORDER,
    TABLES,
    DimensionwiseQuantizer,
    gaussian_cells,
    published_levels,
    spectral_order,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def two_humps(count):
    return torch.where(normal(count) > 0, 3.0, -3.0) + 0.3 * normal(count, seed=1)


def nearest(quantizer, x):
    """What the lookup must find, with the tensor of distances that it does without."""
    return (x[..., None].double() - quantizer.levels).abs().argmin(-1)


def mse(quantizer, x):
    return (quantizer.decode(quantizer.quantize(x)) - x).square().mean(dim=0)


@pytest.mark.parametrize(
    ("levels", "first", "largest"),
    [
        (8, [-1.628965, -0.895384, -0.491349, -0.157976], 2.7149),
        (16, [-1.938706, -1.325913, -1.012887, -0.777882, -0.579963], 3.2312),
        (64, [-2.437096, -1.994237, -1.764206, -1.602344, -1.474298], 4.0618),
    ],
)
def test_published_table(levels, first, largest):
    _, means = gaussian_cells(levels)
    torch.testing.assert_close(means[: len(first)], torch.tensor(first).double(), rtol=0, atol=1e-5)
    assert torch.equal(means, -means.flip(0)) and (means.diff() > 0).all()
    assert published_levels(levels)[-1] == pytest.approx(largest, abs=1e-4)


def test_published_indices_on_both_sides_of_the_range():
    x = torch.tensor([-6, -4, -3.5, -1, -0.5, -0.05, 0.05, 0.1, 0.5, 1, 2, 3, 3.9, 6, 0])[:, None]
    for levels, expected in {
        64: [0, 0, 1, 17, 24, 31, 32, 33, 39, 46, 56, 61, 63, 63, 31],
        16: [0, 0, 0, 4, 6, 7, 8, 8, 9, 11, 14, 15, 15, 15, 7],
    }.items():
        assert DimensionwiseQuantizer(1, levels).quantize(x)[:, 0].tolist() == expected


@pytest.mark.parametrize(("levels", "error", "bits"), [(8, 4.04e-2, 2.70), (16, 1.03e-2, 3.72), (64, 6.57e-4, 5.72)])
def test_published_error_and_entropy_on_a_unit_normal(levels, error, bits):
    quantizer, x = DimensionwiseQuantizer(1, levels), normal(1_000_000, 1)
    assert mse(quantizer, x).item() == pytest.approx(error, rel=0.02)
    share = quantizer.quantize(x).flatten().bincount(minlength=levels) / len(x)
    assert -(share * share.log2()).sum().item() == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("levels", [0, 1, 741])
def test_a_table_that_cannot_be_is_refused(levels):
    with pytest.raises(UserError, match=rf"2\.\.740, got {levels}"):
        DimensionwiseQuantizer(3, levels)
    assert DimensionwiseQuantizer(3, 740).quantize(torch.zeros(1, 3)).tolist() == [[369, 369, 369]]


@pytest.mark.parametrize("mode", TABLES)
@pytest.mark.parametrize("levels", [2, 7, 64])
def test_the_lookup_is_the_nearest_level_and_requantization_changes_nothing(mode, levels):
    quantizer = DimensionwiseQuantizer(4, levels)
    # Off centre, wide, with heavy tails (many midpoints in one cell of the grid), and in two humps.
    heavy = normal(5000) / (normal(5000, seed=2).abs() + 0.05)
    x = torch.stack([normal(5000) + 100, 30 * normal(5000), heavy, two_humps(5000)], dim=1)
    quantizer.fit(x, mode)
    assert (quantizer.levels.diff(dim=1) > 0).all()
    x = torch.cat([x, quantizer.levels.T])
    ids = quantizer.quantize(x)
    sure = (x[..., None] - quantizer.midpoints).abs().amin(-1) > 1e-6 * x.abs()
    assert torch.equal(ids[sure], nearest(quantizer, x)[sure]) and sure.float().mean() > 0.99
    assert ids.unique().tolist() == list(range(levels))
    assert torch.equal(quantizer.quantize(quantizer.decode(ids)), ids)
    beyond = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])[:, None].expand(-1, 4)
    assert quantizer.quantize(beyond)[:, 0].tolist() == [0, 0, levels - 1, levels - 1]


def test_a_value_in_the_middle_takes_the_lower_level_and_the_next_float_the_upper():
    quantizer = DimensionwiseQuantizer(2, 16)
    quantizer.fit(torch.stack([normal(4000), 5 + two_humps(4000)], dim=1), "lloyd_max")
    middle = quantizer.midpoints.T
    expected = torch.arange(15)[:, None].expand(-1, 2)
    assert torch.equal(quantizer.quantize(middle), expected)
    assert torch.equal(quantizer.quantize(middle.nextafter(torch.tensor(torch.inf))), expected + 1)


def test_the_error_falls_in_the_expected_order():
    x = torch.stack([0.2 * normal(50_000) + 1, two_humps(50_000)], dim=1)
    errors = {}
    for mode in ("published", *TABLES):
        quantizer = DimensionwiseQuantizer(2, 16)
        if mode != "published":
            quantizer.fit(x, mode)
        errors[mode] = mse(quantizer, x)
    gauss, humps = ({mode: error[column].item() for mode, error in errors.items()} for column in (0, 1))
    assert gauss["lloyd_max"] < gauss["gaussian"] < gauss["quantile"] < gauss["uniform"] < gauss["published"]
    assert gauss["lloyd_max"] / 0.04 == pytest.approx(9.5e-3, rel=0.03)  # Max 1960, table I
    assert humps["lloyd_max"] < humps["quantile"] < humps["uniform"] < humps["gaussian"]


def test_a_fit_follows_shift_and_scale_of_each_channel():
    x = torch.stack([normal(10_000), 40 * normal(10_000) - 7], dim=1)
    for mode in TABLES:
        quantizer = DimensionwiseQuantizer(2, 16)
        quantizer.fit(x, mode)
        before = quantizer.quantize(x)
        quantizer.fit(3 * x + 11, mode)
        assert (quantizer.quantize(3 * x + 11) != before).float().mean() < 1e-3


def test_quantiles_are_equally_likely_and_each_the_mean_of_its_cell():
    x = normal(64_000, 1).exp()
    quantizer = DimensionwiseQuantizer(1, 8)
    quantizer.fit(x, "quantile")
    cells = x[:, 0].sort().values.view(8, -1)
    torch.testing.assert_close(quantizer.levels[0], cells.mean(dim=1))


def test_bf16_autocast_changes_no_index_and_gradients_pass_straight_through():
    quantizer, x = DimensionwiseQuantizer(5, 64), normal(1000, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values, ids = quantizer(x)
    assert values.dtype == torch.float32 and torch.equal(ids, nearest(quantizer, x))
    torch.testing.assert_close(values, quantizer.decode(ids))
    (values * torch.arange(5)).sum().backward()
    assert torch.equal(x.grad, torch.arange(5.0).expand(1000, -1))


def test_a_loaded_table_is_the_one_that_is_looked_up():
    fitted, loaded = DimensionwiseQuantizer(2, 16), DimensionwiseQuantizer(2, 16)
    x = torch.stack([normal(2000) * 9, two_humps(2000)], dim=1)
    fitted.fit(x, "lloyd_max")
    state = fitted.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"levels": (2, 16), "midpoints": (2, 15)}
    loaded.load_state_dict(state)
    assert torch.equal(loaded.quantize(x), fitted.quantize(x))


class Largest(TorchFunctionMode):
    """Notes the size of the largest tensor that any operation returns."""

    values = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_the_lookup_makes_no_tensor_of_distances():
    quantizer, x = DimensionwiseQuantizer(16, 256), normal(4096, 16)
    with Largest() as largest:
        quantizer.quantize(x)
    assert largest.values == x.numel()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (torch.full((100,), 2.5), "channel 1 is constant"),
        (torch.cat([torch.arange(99.0), torch.tensor([torch.nan])]), "channel 1 holds values that are not finite"),
        (torch.arange(100) % 3 + 0.0, "channel 1 has too few distinct values for 16 levels"),
    ],
)
def test_a_channel_that_no_table_fits_is_named(column, message):
    with pytest.raises(UserError, match=message):
        DimensionwiseQuantizer(2, 16).fit(torch.stack([torch.arange(100.0), column], dim=1), "quantile")


def test_other_input_that_cannot_be():
    quantizer = DimensionwiseQuantizer(4, 16)
    for call in (lambda: quantizer.quantize(normal(2, 3)), lambda: quantizer.fit(normal(100, 3), "gaussian")):
        with pytest.raises(UserError, match="4 channels, got 3"):
            call()
    with pytest.raises(UserError, match="16 levels cannot be fitted to 15 values"):
        quantizer.fit(normal(15, 4), "gaussian")
    with pytest.raises(UserError, match="did you mean 'gaussian'"):
        quantizer.fit(normal(100, 4), "gausian")


def test_channels_are_ordered_by_their_share_of_low_frequencies():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    noise = normal(40, 16, 16)
    wave = torch.cos(2 * torch.pi * (rows + columns) / 16)
    fine = torch.cos(torch.pi * rows)
    channels = torch.stack([noise, 5 * fine + noise, 9 * wave + noise, 6 + 0.5 * noise], dim=-1)
    assert spectral_order(channels).tolist() == [3, 2, 0, 1]
    assert spectral_order(1000 * channels).tolist() == [3, 2, 0, 1]
    # Without the mean, the last channel is as white as the first.
    assert spectral_order(channels, drop_dc=True)[0] == 2 and spectral_order(channels, drop_dc=True)[-1] == 1
    with pytest.raises(UserError, match=r"4 x 4 grid lies within 0\.25"):
        spectral_order(channels[:, :4, :4], drop_dc=True)


def test_the_published_order_names_every_channel_once():
    assert sorted(KL16_ORDER) == list(range(16))
    assert torch.tensor(KL16_ORDER).argsort().tolist() == [7, 1, 12, 8, 6, 15, 4, 10, 0, 3, 2, 9, 5, 14, 11, 13]
