import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers.residual_multiscale import ResidualMultiscale, ScaleCodes, scale_sizes
from vistok.quantizers.shared_dual_vq import SharedDualCodebook
from vistok.quantizers.vq import Codebook, CodebookOptions

SIZES = ((1, 1), (2, 2), (3, 4), (5, 6))
ENDS = (1, 5, 17, 47)


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(mode="cascade", sizes=SIZES, drop=0.0, vocab_size=64, **options):
    torch.manual_seed(0)
    if mode == "cascade":
        codebook = SharedDualCodebook(vocab_size, 6, 3, options=CodebookOptions(**options))
        return ResidualMultiscale(codebook, sizes, drop=drop)
    codebook = Codebook(vocab_size, 9, CodebookOptions(normalized=False, **options))
    codebook.set_rows(0.5 * maps(vocab_size, 9, seed=1))
    return ResidualMultiscale(codebook, sizes, 4, "residual", drop=drop)


def as_map(rows, size=(5, 6)):
    return rows.mT.unflatten(2, size)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_every_scale_quantizes_what_the_coarser_ones_leave(mode):
    model, h = quantizer(mode), maps(2, 9, 5, 6)
    quantized = model(h)
    ids, left, start = quantized.ids, h, 0
    assert ids.shape == (2, 47)
    for end, (height, width) in zip(ENDS, SIZES):
        pooled = F.interpolate(left, (height, width), mode="area")
        assert torch.equal(ids[:, start:end], model.codebook.nearest(pooled.flatten(2).mT))
        left, start = h - model.decode(ids[:, :end]).detach(), end
    # q̂ + r = h; the residual's energy may well rise at a scale, since a normalised code has its own length.
    torch.testing.assert_close(as_map(quantized.codes) + left, h)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_codes_and_prefixes_decode_to_what_was_quantized(mode):
    model, h = quantizer(mode), maps(2, 9, 5, 6)
    ids = model.encode(h)
    torch.testing.assert_close(model.decode(ids), as_map(model(h).codes))
    decoded = [model.decode(ids[:, :end]) for end in ENDS]
    assert all(each.shape == h.shape for each in decoded)
    if mode == "cascade":  # one code for the whole grid
        torch.testing.assert_close(decoded[0], model.embed(ids[:, :1]).mT[..., None].expand_as(h))
    assert not torch.allclose(decoded[1], decoded[2])


def test_gradient_of_the_cascade_is_that_of_each_normalised_residual():
    model, h = quantizer(beta=0.0), maps(1, 9, 5, 6).requires_grad_()
    weight = maps(1, 9, 5, 6, seed=3)
    (as_map(model(h).codes) * weight).sum().backward()
    again, total = h.detach().clone().requires_grad_(), 0.0
    ids, start = model.encode(h), 0
    for end, size in zip(ENDS, SIZES):
        done = model.decode(ids[:, :start]).detach() if start else 0.0
        z = model.codebook.normalize(F.adaptive_avg_pool2d(again - done, size).flatten(2).mT).mT.unflatten(2, size)
        total, start = total + F.interpolate(z, (5, 6), mode="bicubic"), end
    (total * weight).sum().backward()
    torch.testing.assert_close(h.grad, again.grad)


def test_the_residual_mode_passes_one_identity_gradient():
    model, h = quantizer("residual"), maps(2, 9, 5, 6).requires_grad_()
    weight = maps(2, 9, 5, 6, seed=3)
    quantized = model(h)
    (as_map(quantized.codes) * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight)
    assert model.codebook.tables[0].grad is None
    quantized.terms["codebook"].backward()
    torch.testing.assert_close(h.grad, weight)
    touched = (model.codebook.tables[0].grad.abs().sum(dim=1) > 0).nonzero()[:, 0]
    assert torch.equal(touched, quantized.ids.unique())
    assert all(conv.weight.grad.abs().sum() > 0 for conv in model.phi)


def test_gradients_of_the_cascade_reach_both_tables_on_selected_rows_only():
    model = quantizer()
    quantized = model(maps(2, 9, 5, 6))
    quantized.terms["codebook"].backward()
    for table in model.codebook.tables:
        assert torch.equal((table.grad.abs().sum(dim=1) > 0).nonzero()[:, 0], quantized.ids.unique())


def test_phi_convolutions_are_shared_as_the_released_weights_share_them():
    scales = scale_sizes((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 16)
    assert ScaleCodes(4, 3, scales, phi=4)._phi_of_scale == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert ScaleCodes(4, 3, scales, phi=10)._phi_of_scale == list(range(10))
    assert ScaleCodes(4, 3, scales, phi=1)._phi_of_scale == [0] * 10


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_generator_inputs_see_only_coarser_scales(mode):
    model = quantizer(mode)
    ids = torch.randint(64, (2, 47), generator=torch.Generator().manual_seed(0))
    inputs = model.inputs(ids)
    assert inputs.shape == (2, 46, 9)
    # Of a prefix, the last inputs are those of the scale that comes next; the last scale itself is read by nothing.
    for end, after in zip(ENDS, (*ENDS[1:], 47)):
        torch.testing.assert_close(model.inputs(ids[:, :end]), inputs[:, : after - 1])
    changed = ids.clone()
    changed[:, 5:17] = (changed[:, 5:17] + 1) % 64
    differs = (model.inputs(changed) != inputs).any(dim=-1).all(dim=0)
    assert not differs[:16].any() and differs[16:].all()


def test_cascade_inputs_are_no_direct_sums():
    model = quantizer()
    ids = torch.randint(64, (2, 47), generator=torch.Generator().manual_seed(0))
    codes = [model.embed(part).mT.unflatten(2, size) for part, size in zip(ids.split((1, 4, 12, 30), dim=1), SIZES)]
    state, expected = codes[0], []
    for code, size in zip(codes[1:], SIZES[1:]):
        state = F.interpolate(state, size, mode="bicubic")
        expected.append(state.flatten(2).mT)
        state = state + code
    torch.testing.assert_close(model.inputs(ids), torch.cat(expected, dim=1))
    torch.testing.assert_close(model.refined_inputs(ids), state.flatten(2).mT)
    assert (state - model.decode(ids)).norm() > 0.02 * state.norm()


def test_residual_inputs_are_pooled_sums_of_the_full_grid():
    model = quantizer("residual")
    ids = torch.randint(64, (2, 47), generator=torch.Generator().manual_seed(0))
    inputs = model.inputs(ids).split((4, 12, 30), dim=1)
    for end, size, rows in zip(ENDS, SIZES[1:], inputs):
        torch.testing.assert_close(as_map(rows, size), F.interpolate(model.decode(ids[:, :end]), size, mode="area"))
    refined = F.interpolate(model.decode(ids[:, :17]), (3, 4), mode="area")
    torch.testing.assert_close(as_map(model.refined_inputs(ids[:, :17]), (3, 4)), refined)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_scale_codes_are_a_frozen_copy(mode):
    model = quantizer(mode)
    copy = model.scale_codes()
    ids = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    assert not [p for p in copy.parameters() if p.requires_grad]
    assert torch.equal(copy.decode(ids), model.decode(ids)) and torch.equal(copy.inputs(ids), model.inputs(ids))
    own = ScaleCodes(64, 9, SIZES, len(model.phi), mode)
    own.load_state_dict(copy.state_dict())
    assert torch.equal(own.decode(ids), model.decode(ids))
    with torch.no_grad():
        model.codebook.tables[0].neg_()
    assert not torch.equal(copy.decode(ids), model.decode(ids))


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_dropped_scales(mode):
    model, h = quantizer(mode, drop=1.0), maps(2, 9, 5, 6)
    rng = torch.Generator().manual_seed(0)
    assert {model._drawn_scale(rng) for _ in range(100)} == {1, 2, 3}, "never the first"
    model.drop = 0.3
    assert 60 < sum(model._drawn_scale(rng) is not None for _ in range(300)) < 120
    full, (without, _) = model.encode(h), model.quantize(h, dropped=1)
    assert without.ids.shape == full.shape and torch.equal(without.ids[:, :5], full[:, :5])
    parts = dict(enumerate(without.ids.split((1, 4, 12, 30), dim=1)))
    rest = sum(model._spread(as_map(model.embed(parts[scale]), SIZES[scale]), scale) for scale in (0, 2, 3))
    torch.testing.assert_close(as_map(without.codes), rest)
    torch.manual_seed(0)
    model.drop = 1.0
    first = model(h, torch.Generator().manual_seed(1))
    again = model(h, torch.Generator().manual_seed(1))
    assert torch.equal(first.codes, again.codes) and not torch.equal(first.ids, full)
    assert torch.equal(model.eval()(h).ids, full)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_codebooks_learn_once_per_batch_from_all_scales(mode):
    model, h = quantizer(mode, ema_decay=0.5), maps(2, 9, 5, 6)
    before = model.codebook.rows()
    quantized, vectors = model.quantize(h)
    model(h)
    assert torch.equal(model.codebook._count, 0.5 * torch.bincount(quantized.ids.flatten(), minlength=64).float())
    chosen = quantized.ids == quantized.ids[0, 0]
    mean = model.codebook.normalize(vectors)[chosen].mean(dim=0)
    torch.testing.assert_close(model.codebook.embed(quantized.ids[0, 0]), model.codebook.normalize(mean))
    assert not torch.equal(model.codebook.rows(), before)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_kmeans_and_revival_put_entries_where_the_scales_need_them(mode):
    def error(options):
        model = quantizer(mode, **options)
        h = maps(8, 9, 5, 6)
        for step in range(3):
            model(h, torch.Generator().manual_seed(step))
        return (as_map(model.eval()(h).codes) - h).square().mean(), len(model.encode(h).unique())

    plain, started = error({}), error({"kmeans": True})
    revived = error({"ema_decay": 0.5, "revive_after": 1})
    assert started[0] < plain[0] and started[1] > 0.9 * 64
    assert revived[1] >= plain[1]


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_kmeans_reads_what_exact_codes_would_leave_to_each_scale(mode, monkeypatch):
    model, h, read = quantizer(mode, kmeans=True), maps(2, 9, 5, 6), []
    monkeypatch.setattr(model.codebook, "start", lambda vectors, rng: read.append(vectors()))
    model(h)
    left = h
    for scale, (rows, size) in enumerate(zip(read[0].split((1, 4, 12, 30), dim=1), SIZES)):
        torch.testing.assert_close(rows, model.codebook.normalize(F.adaptive_avg_pool2d(left, size).flatten(2).mT))
        left = left - model._spread(as_map(rows, size), scale).detach()


def test_one_scale_is_plain_quantization():
    model, h = quantizer(sizes=((5, 6),)), maps(2, 9, 5, 6)
    alone = model.codebook(h.flatten(2).mT)
    quantized = model(h)
    assert torch.equal(quantized.ids, alone.ids)
    torch.testing.assert_close(quantized.codes, alone.codes)
    assert model.inputs(quantized.ids).shape == (2, 0, 9)


def test_autocast_changes_nothing():
    for mode in ("cascade", "residual"):
        model, h = quantizer(mode), maps(2, 9, 5, 6)
        plain = model(h)
        with torch.autocast("cpu", torch.bfloat16):
            cast, decoded, inputs = model(h), model.decode(plain.ids), model.inputs(plain.ids)
        assert torch.equal(plain.ids, cast.ids) and torch.equal(plain.codes, cast.codes)
        assert torch.equal(decoded, model.decode(plain.ids)) and torch.equal(inputs, model.inputs(plain.ids))


def test_bad_input_is_refused():
    with pytest.raises(UserError, match=r"grid of 16 x 16 positions, got \[1, 2, 14\]"):
        scale_sizes((1, 2, 14), 16)
    with pytest.raises(UserError, match="must grow"):
        scale_sizes((1, 4, 2, 16), 16)
    with pytest.raises(UserError, match=r"last scale is \(5, 6\), but the map to quantize is \(6, 6\)"):
        quantizer()(maps(1, 9, 6, 6))
    with pytest.raises(UserError, match=r"6 is no prefix of whole scales \(1, 5, 17, 47\)"):
        quantizer().decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(UserError, match="no entropy penalty"):
        quantizer("residual", entropy=0.1)
