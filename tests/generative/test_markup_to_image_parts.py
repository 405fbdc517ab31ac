"""Columns that are aligned against a brute-force programme, and attention that knows the order of tokens."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.generative import PositionedCrossAttention, column_dtw
from posterity.lab import markup
from posterity.testing import check_layer, check_metric


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def greys(n, height, width, seed=0):
    return torch.rand(n, height, width, dtype=torch.float64, generator=rng(seed))


def brute(one, other, threshold, rows):
    """Return the distance by loops over pixels, shifts and pairs of columns."""
    ink, wanted = (np.asarray(x) < threshold for x in (one, other))
    height, width = ink.shape
    best = np.full((width + 1, width + 1), math.inf)
    best[0, 0] = 0
    for i in range(width):
        for j in range(width):
            costs = []
            for by in range(-rows, rows + 1):
                pairs = [(r + by, r) for r in range(height) if 0 <= r + by < height]
                costs.append(sum(ink[a, i] != wanted[b, j] for a, b in pairs))
            best[i + 1, j + 1] = min(costs) + min(best[i, j], best[i, j + 1], best[i + 1, j])
    return math.sqrt(best[-1, -1])


@pytest.mark.parametrize(("shift", "rows"), [(0.0, 0), (0.1, 1), (0.3, 3), (0.95, 9)])
def test_distance_is_that_of_a_brute_force_programme(shift, rows):
    pred, target = greys(4, 10, 9), greys(4, 10, 9, seed=1)
    got = column_dtw(pred, target, threshold=0.4, shift=shift)
    expected = [brute(a, b, 0.4, rows) for a, b in zip(pred, target, strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert all(expected) or rows == 9


def test_many_pictures_are_taken_in_parts(monkeypatch):
    pred, target = greys(5, 6, 7), greys(5, 6, 7, seed=1)
    whole = column_dtw(pred, target)
    monkeypatch.setattr("posterity.generative.column_alignment.ROOM", 100)
    assert torch.equal(column_dtw(pred, target), whole)


def test_equal_pictures_repeated_columns_and_small_shifts_cost_nothing():
    x = greys(3, 20, 8)
    assert (column_dtw(x, x) == 0).all()
    stretched = torch.cat([x[..., :3], x[..., 2:3], x[..., 3:7]], 2)  # the last column has no ink in either
    x, stretched = (torch.cat([part[..., :-1], torch.ones(3, 20, 1)], 2) for part in (x, stretched))
    x[..., 6:] = 1
    assert (column_dtw(stretched, x, shift=0) == 0).all()
    inside = torch.ones(3, 20, 8, dtype=torch.float64)
    inside[:, 4:16] = greys(3, 12, 8)
    for by in (1, 2, -2):
        assert (column_dtw(inside.roll(by, 1), inside) == 0).all()  # 0.1 of 20 rows
        assert (column_dtw(inside.roll(by, 1), inside, shift=0) > 0).all()
    assert (column_dtw(inside.roll(3, 1), inside) > 0).all()


def test_a_missing_stroke_costs_the_root_of_its_ink():
    pred, target = torch.ones(1, 30, 40), torch.ones(1, 30, 40)
    target[:, 10:20, 5:8] = 0
    assert column_dtw(pred, target) == pytest.approx(math.sqrt(30))
    assert column_dtw(target, pred) == pytest.approx(math.sqrt(30))


def test_conforms_to_metrics(as_a_user):
    line = torch.ones(4, 4, 5)
    line[:, :, 2] = 0
    check_metric(
        lambda pred, target: column_dtw(pred, target).mean(), greys(6, 12, 9), greys(6, 12, 9, seed=1),
        known=[((line, line), 0.0), ((torch.ones(4, 4, 5), line), 2.0)],
    )  # fmt: skip


def attend(zero=False, **options):
    torch.manual_seed(0)
    layer = PositionedCrossAttention(
        8, 5, n_heads=2, groups=4, max_height=6, max_width=7, max_tokens=9, **options
    )
    if not zero:
        for part in (layer.leave.weight, layer.leave.bias):
            nn.init.normal_(part, generator=rng(1))
    return layer


@pytest.fixture
def batch():
    h, tokens = torch.randn(3, 8, 4, 6, generator=rng()), torch.randn(3, 7, 5, generator=rng(1))
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    return h, tokens, mask


def test_conforms_to_layers(as_a_user, batch):
    torch.manual_seed(0)
    check_layer(attend(), *batch, shape=batch[0].shape)
    check_layer(attend(), *batch[:2], shape=batch[0].shape)


def test_a_new_block_is_the_identity(batch):
    assert torch.equal(attend(zero=True)(*batch), batch[0])


def test_masked_tokens_have_no_influence(batch):
    h, tokens, mask = batch
    layer = attend()
    other = tokens.clone()
    other[~mask] = math.nan
    torch.testing.assert_close(layer(h, other, mask), layer(h, tokens, mask), rtol=0, atol=1e-6)
    short = layer(h[2:], tokens[2:, :1])
    torch.testing.assert_close(layer(h, tokens, mask)[2:], short, rtol=0, atol=1e-5)
    assert (layer(h, tokens)[1:] - layer(h, tokens, mask)[1:]).abs().amax((1, 2, 3)).min() > 1e-3


def test_order_of_tokens_and_place_of_pixels_matter(batch):
    h, tokens, _ = batch
    layer = attend()
    assert (layer(h, tokens.flip(1)) - layer(h, tokens)).abs().max() > 1e-2
    for axis in (2, 3):
        assert (layer(h.flip(axis), tokens).flip(axis) - layer(h, tokens)).abs().max() > 1e-2
    with torch.no_grad():
        layer.place.zero_()
        torch.testing.assert_close(layer(h, tokens.flip(1)), layer(h, tokens), rtol=0, atol=1e-4)
        layer.row.zero_()
        layer.column.zero_()
    torch.testing.assert_close(layer(h.flip(2, 3), tokens).flip(2, 3), layer(h, tokens), rtol=0, atol=1e-4)


def test_where_no_token_counts_pixels_attend_to_each_other_only(batch):
    h, tokens, mask = batch
    layer, mask = attend(), mask & torch.tensor([True, True, False])[:, None]
    out = layer(h, tokens, mask)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(part.grad).all() for part in layer.parameters() if part.grad is not None)
    torch.testing.assert_close(out[2:], layer(h[2:], 9 - tokens[2:], mask[2:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[:2], layer(h, tokens, batch[2])[:2], rtol=0, atol=1e-5)


def test_attention_is_torchs(batch):
    """The tokens are read as nn.MultiheadAttention with the same weights reads them."""
    h, tokens, mask = batch
    layer = attend().to_tokens
    theirs = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_bias.zero_()
        for name, own in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
            getattr(theirs, f"{name}_proj_weight").copy_(own.weight)
        theirs.out_proj.load_state_dict(layer.out.state_dict())
    x = h.flatten(2).mT
    expected, _ = theirs(x, tokens, tokens, key_padding_mask=~mask)
    torch.testing.assert_close(layer(x, tokens, mask), expected, rtol=1e-4, atol=1e-5)


def test_drawn_sets_are_what_their_markup_says():
    digits = markup.glyphs(5)
    assert digits.classes[123] == "123"
    assert np.array_equal(digits.x[123, 0, :, :8], digits.x[197, 0, :, :8])  # one drawing a digit
    assert np.array_equal(digits.x[123, 0, :, 16:], digits.x[3, 0, :, 16:])
    spans = markup.tables(5, n=40)
    for picture, words in zip(spans.x[:, 0], spans.classes, strict=True):
        lines = words.split("/")
        for i, line in enumerate(lines):
            for j, letter in enumerate(line):
                middle = int(32 * (i + 0.5) / len(lines)), int(32 * (j + 0.5) / len(line)) + 1
                assert picture[middle] == {"e": 0, "g": 0.5, "w": 1}[letter]
    numbers, known = markup.tokens(["ab", "b"])
    assert numbers.tolist() == [[1, 2], [2, 0]]
    assert known == ("", "a", "b")


def test_formulas_are_drawn_by_matplotlib():
    pytest.importorskip("matplotlib")
    drawn = markup.formulas(5, n=3)
    assert drawn.x.shape == (3, 1, 32, 96)
    assert len(set(drawn.classes)) == 3
    assert (F.relu(torch.from_numpy(drawn.x)).flatten(1).max(1).values > 0.5).all()


GREY, BLOCK = torch.ones(2, 4, 5), attend()
H, WORDS = torch.zeros(2, 8, 4, 5), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: column_dtw(GREY, GREY[..., :4]), r"target must have shape \(2, 4, 5\) for pred, got \(2, 4, 4\)"),
        (lambda: column_dtw(GREY[0], GREY[0]), r"pred must have shape \(any, any, any\), got \(4, 5\)"),
        (lambda: column_dtw(GREY.byte(), GREY), r"pred must be .* got dtype torch.uint8: scale to \[0, 1\]"),
        (lambda: column_dtw(GREY, None), "target must be a floating-point tensor, got NoneType"),
        (lambda: column_dtw(GREY, 2 * GREY), r"target must be in \[0, 1\], got values from 2 to 2"),
        (lambda: column_dtw(GREY * math.nan, GREY), "pred must be finite"),
        (lambda: column_dtw(GREY[:, :0], GREY[:, :0]), r"pred must have rows and columns, got \(2, 0, 5\)"),
        (lambda: column_dtw(GREY, GREY, threshold=1.0), r"threshold must be in \(0, 1\), got 1.0"),
        (lambda: column_dtw(GREY, GREY, shift=1.0), r"shift must be in \[0, 1\), got 1.0"),
        (lambda: column_dtw(GREY, GREY, shift=-0.1), r"shift must be in \[0, 1\), got -0.1"),
        (lambda: PositionedCrossAttention(10, 5, n_heads=4, groups=2), "channels must be divisible by n_heads = 4, got 10"),
        (lambda: PositionedCrossAttention(10, 5, n_heads=5, groups=4), "channels must be divisible by groups = 4, got 10"),
        (lambda: PositionedCrossAttention(9, 5, n_heads=3, groups=3), "channels must be even"),
        (lambda: PositionedCrossAttention(8, 0, n_heads=2, groups=4), "token_dim must be an integer of at least 1, got 0"),
        (lambda: PositionedCrossAttention(8, 5, n_heads=2, groups=4, max_width=0), "max_width must be an integer of at least 1"),
        (lambda: BLOCK(H[:, :4], WORDS), r"h must have shape \(any, 8, any, any\) for the channels, got \(2, 4, 4, 5\)"),
        (lambda: BLOCK(torch.zeros(2, 8, 4, 8), WORDS), "h must be of 1 to 6 x 7 rows and columns.* got 4 x 8"),
        (lambda: BLOCK(torch.zeros(2, 8, 7, 4), WORDS), "h must be of 1 to 6 x 7 rows and columns.* got 7 x 4"),
        (lambda: BLOCK(H, torch.zeros(2, 10, 5)), "tokens must be of 1 to 9 tokens, .* got 10"),
        (lambda: BLOCK(H, WORDS[:, :0]), "tokens must be of 1 to 9 tokens, .* got 0"),
        (lambda: BLOCK(H, WORDS[:1]), r"tokens must have shape \(2, any, 5\) for h and token_dim, got \(1, 3, 5\)"),
        (lambda: BLOCK(H, WORDS.long()), "tokens must be a floating-point tensor, got dtype torch.int64"),
        (lambda: BLOCK(H, WORDS, torch.ones(2, 3)), "mask must be a tensor of bool, got torch.float32"),
        (lambda: BLOCK(H, WORDS, torch.ones(2, 4).bool()), r"mask must have shape \(2, 3\) for tokens, got \(2, 4\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
