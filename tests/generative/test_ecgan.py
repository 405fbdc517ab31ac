"""Gates in closed form, a generator whose parts are connected, and a trainer that moves one network at a time."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.generative import (
    ECGAN,
    ClassSimilarityLoss,
    ECGANGenerator,
    ECGANOutput,
    EdgeTransfer,
    MultiModalDiscriminator,
    SemanticPreserving,
    edges,
)
from posterity.testing import check_layer, check_loss


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def layout_of(n=2, k=3, h=5, w=7, seed=0):
    return F.one_hot(torch.randint(k, (n, h, w), generator=rng(seed)), k).movedim(3, 1)


def made(cls, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(*args, **options)


class Part(nn.Module):
    """One part of what a network returns, as a layer: a field, or the scores of all scales."""

    def __init__(self, net, name=""):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, *inputs):
        out = self.net(*inputs)
        return getattr(out, self.name) if self.name else torch.cat([scale[-1].flatten() for scale in out])


# --- edge transfer ---


def test_an_edge_passes_x_once_to_twice():
    x = torch.randn(2, 3, 4, 4, generator=rng())
    for score, factor in ((-math.inf, 1.0), (0.0, 1.5), (math.inf, 2.0)):
        torch.testing.assert_close(EdgeTransfer()(x, torch.full((2, 3, 4, 4), score)), factor * x)
    edge = torch.randn(2, 1, 4, 4, generator=rng(1))
    torch.testing.assert_close(EdgeTransfer()(x, edge), x * edge.sigmoid() + x)


def test_edge_transfer_conforms_to_its_kind(as_a_user):
    x, edge = (torch.randn(2, 3, 4, 4, generator=rng(seed)).requires_grad_() for seed in range(2))
    check_layer(EdgeTransfer(), x, edge, shape=(2, 3, 4, 4))


# --- semantic preserving ---


def test_with_one_class_it_is_squeeze_and_excitation_with_a_residual():
    gate, x = made(SemanticPreserving, 1, 8), torch.randn(3, 8, 4, 5, generator=rng())
    pooled = x.mean((2, 3))
    gamma = torch.sigmoid(gate.excite(torch.relu(gate.squeeze(pooled))))
    torch.testing.assert_close(gate(x, torch.ones(3, 1, 4, 5)), x * (1 + gamma[..., None, None]))


def test_pixels_are_gated_by_their_class_in_their_image():
    """By a loop over images, classes and pixels; class 3 has none."""
    gate, x = (
        made(SemanticPreserving, 4, 6, reduction=2).double(),
        torch.randn(2, 6, 3, 4, generator=rng()).double(),
    )
    layout = layout_of(2, 3, 3, 4)
    padded = torch.cat([layout, torch.zeros_like(layout[:, :1])], 1)
    wanted = torch.empty_like(x)
    for image in range(2):
        for c in range(3):
            where = layout[image, c].bool()
            mean = x[image][:, where].mean(1)
            gamma = torch.sigmoid(gate.excite(torch.relu(gate.squeeze(mean))))
            assert ((gamma > 0) & (gamma < 1)).all()
            wanted[image][:, where] = x[image][:, where] * (1 + gamma[:, None])
    torch.testing.assert_close(gate(x, padded), wanted)
    torch.testing.assert_close(gate(x, padded[:, [2, 0, 3, 1]]), wanted)  # names of classes do not matter


def test_a_layout_of_another_size_is_brought_to_the_features():
    gate, x = made(SemanticPreserving, 3, 4), torch.randn(2, 4, 3, 4, generator=rng())
    large = layout_of(h=7, w=9)
    small = F.interpolate(large.double(), (3, 4), mode="nearest")
    assert torch.equal(gate(x, large), gate(x, small))


def test_semantic_preserving_conforms_to_its_kind(as_a_user):
    x = torch.randn(2, 8, 5, 7, generator=rng()).requires_grad_()
    check_layer(made(SemanticPreserving, 3, 8), x, layout_of(), shape=(2, 8, 5, 7))


# --- the label map regained ---


def test_similarity_is_cross_entropy_and_affinities_by_loops():
    logits, layout = torch.randn(2, 3, 2, 3, generator=rng()).double(), layout_of(2, 3, 2, 3)
    share, truth = logits.softmax(1), layout.double()
    total = F.cross_entropy(logits, layout.argmax(1))
    gaps = []
    for image in range(2):
        ours, theirs = share[image].flatten(1).T, truth[image].flatten(1).T
        for p in range(6):
            for q in range(6):
                cosines = [F.cosine_similarity(m[p], m[q], 0) for m in (ours, theirs)]
                gaps.append((cosines[0] - cosines[1]) ** 2)
    torch.testing.assert_close(ClassSimilarityLoss()(logits, layout), total + sum(gaps) / len(gaps))


def test_a_label_map_read_back_right_costs_nothing_and_names_of_classes_do_not_matter():
    layout, loss = layout_of(h=20, w=33), ClassSimilarityLoss()
    assert loss(60.0 * layout, layout) < 1e-6
    logits = torch.randn(2, 3, 20, 33, generator=rng())
    torch.testing.assert_close(loss(logits, layout), loss(logits[:, [2, 0, 1]], layout[:, [2, 0, 1]]))


def test_similarity_conforms_to_its_kind(as_a_user):
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=rng()).requires_grad_()
    check_loss(ClassSimilarityLoss(), logits, layout_of(), symmetric=True, compiles=False)


# --- generator ---


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (9, 5), (16, 31)])
def test_images_have_the_size_of_the_layout(h, w):
    net = made(ECGANGenerator, 3, width=4, n_layers=2, image_channels=1)
    out = net(layout_of(h=h, w=w))
    shapes = {name: tuple(part.shape) for name, part in out._asdict().items()}
    channels = {"image": 1, "coarse": 1, "edge": 1, "features": 4, "label_logits": 3}
    assert shapes == {name: (2, c, h, w) for name, c in channels.items()}
    for part in (out.image, out.coarse):
        assert part.abs().max() <= 1
    assert (out.edge >= 0).all()
    assert (out.edge <= 1).all()


def test_edges_guide_the_refined_image():
    net = made(ECGANGenerator, 3, width=4)
    net(layout_of()).image.square().sum().backward()
    for layer in (*net.edge_layers, net.to_edge):
        assert all((p.grad != 0).any() for p in layer.parameters())
    net.zero_grad()
    net(layout_of()).coarse.square().sum().backward()
    assert all((p.grad != 0).any() for p in net.edge_layers.parameters())
    assert all(p.grad is None for p in net.refine.parameters())


def test_images_are_of_their_layout_alone():
    net = made(ECGANGenerator, 3, width=4)
    both, one = net(layout_of()).image, net(layout_of()[:1]).image
    torch.testing.assert_close(both[:1], one)


def test_noise_makes_other_images_of_one_layout_and_comes_from_the_generator():
    net, layout = made(ECGANGenerator, 3, width=4, noise_channels=2), layout_of()
    state = torch.get_rng_state()
    images = [net(layout, generator=rng(seed)).image for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*images[:2])
    assert not torch.allclose(images[0], images[2])
    assert not torch.allclose(*net(layout[[0, 0]], generator=rng()).image)


@pytest.mark.parametrize("part", ["image", "label_logits"])
def test_generator_conforms_to_its_kind(as_a_user, part):
    net = Part(made(ECGANGenerator, 3, width=8), part)
    dead = [name for name, _ in net.named_parameters() if ".project." in f".{name}" or (part == "image" and "read_labels" in name)]  # fmt: skip
    check_layer(net, layout_of(h=8, w=8), dead=dead)


# --- discriminator ---


def pairs(n=2, h=9, w=6):
    return (
        layout_of(n, 3, h, w),
        torch.rand(n, 3, h, w, generator=rng()),
        torch.rand(n, 1, h, w, generator=rng(1)),
    )


def test_pairs_are_judged_apart_and_one_may_be_left_out():
    net = made(MultiModalDiscriminator, 3, width=4, n_scales=3).eval()
    layout, image, edge = pairs()
    both, images, maps = net(layout, image, edge), net(layout, image, None), net(layout, None, edge)
    assert [len(scale) for scale in both] == [4, 4, 4]
    for scale in zip(both, images, maps, strict=True):
        for layer, first, second in zip(*scale, strict=True):
            torch.testing.assert_close(layer, torch.cat([first, second]))
    for other in (net(layout[[1, 0]], image, None), net(layout, image.flip(0), None)):
        assert not torch.allclose(other[0][-1], images[0][-1])


def test_every_layer_has_a_largest_singular_value_of_one():
    net = made(MultiModalDiscriminator, 3, width=4)
    for _ in range(30):  # the power method goes on in training
        net(*pairs())
    conv = net.scales[0].layers[0]
    x = torch.eye(4 * 16).view(64, 4, 4, 4)  # one row a weight: the products are the matrix
    with torch.no_grad():
        matrix = F.conv2d(x, conv.weight).flatten(1)
        shown = conv.eval()(x)[:, :, 1, 1] - conv.bias  # stride 2, padding 2: the window that sees all
    torch.testing.assert_close(shown, matrix / torch.linalg.svdvals(matrix).max(), rtol=1e-3, atol=1e-4)


def test_discriminator_conforms_to_its_kind(as_a_user):
    net = Part(made(MultiModalDiscriminator, 3, width=4))
    check_layer(net, *pairs())
    assert isinstance(pickle.loads(pickle.dumps(net.net.train())), MultiModalDiscriminator)
    copy.deepcopy(net.net)(*pairs())[0][0].sum().backward()


# --- trainer ---


def gan(**options):
    discriminator = made(MultiModalDiscriminator, 3, width=4, image_channels=1, n_scales=1)
    return ECGAN(made(ECGANGenerator, 3, width=4, n_layers=1, image_channels=1), discriminator, **options)


def featureless():
    model = gan()
    model.discriminator.forward = lambda layout, image, edge: [[image]]
    return model


def drawn(n=2, h=6, w=5):
    return layout_of(n, 3, h, w), torch.rand(n, 1, h, w, generator=rng(2)) * 2 - 1


def test_the_terms_are_what_the_paper_names_and_the_total_weighs_them():
    weights = {
        "gan": 2.0,
        "feature": 0.5,
        "perceptual": 3.0,
        "edge": 0.25,
        "similarity": 4.0,
        "contrastive": 0.125,
    }
    model = gan(weights=weights, features=lambda x: [x, x.square()])
    model.discriminator.eval()
    layout, image = drawn()
    terms = model.generator_loss(layout, image)
    assert set(terms) == {*weights, "total"}
    torch.testing.assert_close(terms["total"], sum(weight * terms[name] for name, weight in weights.items()))
    out, edge = model.generator(layout), edges((image + 1) / 2)
    tries = (out.coarse, out.image)
    torch.testing.assert_close(terms["edge"], F.binary_cross_entropy(out.edge, edge))
    perceptual = [(f(x) - f(image)).abs().mean() for x in tries for f in (lambda x: x, torch.square)]
    torch.testing.assert_close(terms["perceptual"], sum(perceptual) / 4)
    real = model.discriminator(layout, image, edge)[0]
    fake = [model.discriminator(layout, x, out.edge)[0] for x in tries]
    torch.testing.assert_close(terms["gan"], -sum(f[-1].mean() for f in fake) / 2)
    torch.testing.assert_close(
        terms["feature"],
        sum((a - b).abs().mean() for f in fake for a, b in zip(f[:-1], real[:-1], strict=True)) / 6,
    )
    hinge = (1 - real[-1]).clamp_min(0).mean() + sum((1 + f[-1]).clamp_min(0).mean() for f in fake) / 2
    torch.testing.assert_close(model.discriminator_loss(layout, image), hinge)
    given = model.generator_loss(layout, image, edge=torch.zeros_like(edge))
    torch.testing.assert_close(given["edge"], F.binary_cross_entropy(out.edge, torch.zeros_like(edge)))


def test_each_loss_reaches_its_own_network_only():
    model = gan()
    layout, image = drawn()
    flags = [p.requires_grad for p in model.discriminator.parameters()]
    model.generator_loss(layout, image)["total"].backward()
    assert all(p.grad is None for p in model.discriminator.parameters())
    assert all((p.grad != 0).any() for p in model.generator.parameters())
    assert [p.requires_grad for p in model.discriminator.parameters()] == flags
    model.generator.zero_grad()
    model.discriminator_loss(layout, image).backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert any((p.grad != 0).any() for p in model.discriminator.parameters())


def test_a_term_of_weight_zero_is_not_computed():
    model = gan(weights=dict.fromkeys(("gan", "feature", "edge", "similarity", "contrastive"), 0))
    model.discriminator.forward = None
    terms = model.generator_loss(*drawn())
    assert all(term == 0 for term in terms.values())

    def judge(layout, image, edge):
        assert edge is None
        return [[image, image]]

    model = gan(weights={"edge": 0})
    model.discriminator.forward = judge
    model.generator_loss(*drawn())


def test_a_short_training_is_reproducible_learns_and_leaves_modes_and_randomness_alone():
    layout = layout_of(4, 3, 6, 6)
    image = layout.float()[:, :1] * 1.6 - 0.8
    runs, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        model = gan(weights={"contrastive": 0.1})
        model.contrast.max_pixels_per_class = 4
        model.generator.eval()
        before = F.l1_loss(model.sample(layout), image)
        batches = [(layout[rows], image[rows]) for rows in ([0, 1], [2, 3])]
        assert model.fit(batches, 4, lr_g=2e-2, lr_d=1e-2, generator=rng(seed)) is model
        assert not model.generator.training
        assert model.discriminator.training
        assert all(p.grad is None for p in (*model.generator.parameters(), *model.discriminator.parameters()))
        runs.append(model.sample(layout))
        assert F.l1_loss(runs[-1], image) < 0.85 * before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*runs[:2])
    assert not torch.equal(runs[0], runs[2])


def test_steps_leave_the_other_network_untouched():
    for frozen, rates in (("generator", {"lr_g": 1e-30}), ("discriminator", {"lr_d": 1e-30})):
        model = gan()
        before = {
            name: [p.clone() for p in getattr(model, name).parameters()]
            for name in ("generator", "discriminator")
        }
        model.fit([drawn()], 1, **rates)
        for name, weights in before.items():
            same = all(
                torch.allclose(p, q, rtol=0, atol=1e-12)
                for p, q in zip(getattr(model, name).parameters(), weights, strict=True)
            )
            assert same == (name == frozen)


def test_trains_on_tensors_of_inference_mode():
    model = gan()
    with torch.inference_mode():
        model.fit([drawn()], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_sample_and_have_wide_losses_but_are_not_trained(dtype):
    model = gan()
    layout, image = drawn()
    wide = model.generator_loss(layout, image)["total"]
    model.generator.to(dtype)
    model.discriminator.to(dtype)
    assert model.sample(layout).dtype == dtype
    low = model.generator_loss(layout, image.to(dtype))["total"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, wide, rtol=0.05, atol=0.05)
    assert torch.isfinite(model.discriminator_loss(layout, image.to(dtype)))
    with pytest.raises(
        ValueError, match=f"generator must have weights in float32 or float64 to be trained, got {dtype}"
    ):
        model.fit([(layout, image)], 1)


def test_losses_are_finite_under_autocast():
    model = gan()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model.generator_loss(*drawn())
        assert torch.isfinite(terms["total"] + model.discriminator_loss(*drawn()))
    assert all(term.dtype == torch.float32 for term in terms.values())


# --- edges ---


def test_a_step_is_one_line_whatever_is_added():
    image = 0.5 * (torch.arange(16) > 7).float().expand(1, 3, 12, 16)
    found = edges(image)
    assert found.shape == (1, 1, 12, 16)
    assert (found.sum(3) == 1).all()
    assert (found.sum(2)[0, 0] == 12).sum() == 1  # straight
    assert torch.equal(edges(image + 0.25), found)
    assert not edges(torch.full((1, 3, 12, 16), 0.7)).any()


LAYOUT, IMAGE = drawn()
MAPS = torch.zeros(2, 1, 6, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EdgeTransfer()(IMAGE, MAPS[:1]), r"edge_features must have shape \(2, 1, 6, 5\) for image_features"),
        (lambda: EdgeTransfer()(IMAGE.repeat(1, 3, 1, 1), MAPS.repeat(1, 2, 1, 1)), r"edge_features must have shape \(2, 3"),
        (lambda: EdgeTransfer()(IMAGE.long(), MAPS), "image_features must be a floating-point tensor"),
        (lambda: EdgeTransfer()(IMAGE, None), "edge_features must be a floating-point tensor"),
        (lambda: SemanticPreserving(0, 4), "n_classes must be an integer of at least 1"),
        (lambda: SemanticPreserving(2, 4, reduction=0), "reduction must be an integer of at least 1"),
        (lambda: SemanticPreserving(3, 1)(IMAGE, LAYOUT[:1]), r"layout must have shape \(2, 3, any, any\) for x"),
        (lambda: SemanticPreserving(3, 2)(IMAGE, LAYOUT), r"x must have shape \(any, 2, any, any\) for channels"),
        (lambda: SemanticPreserving(3, 1)(IMAGE[:0], LAYOUT[:0]), "x must have images and pixels"),
        (lambda: ClassSimilarityLoss()(IMAGE, LAYOUT), r"layout must have shape \(2, 1, any, any\) for predicted_logits"),
        (lambda: ClassSimilarityLoss()(IMAGE[..., :0], LAYOUT), "predicted_logits must have pixels"),
        (lambda: ECGANGenerator(1), "n_classes must be an integer of at least 2"),
        (lambda: ECGANGenerator(3, width=1), "width must be an integer of at least 2"),
        (lambda: ECGANGenerator(3, noise_channels=-1), "noise_channels must be an integer of at least 0"),
        (lambda: ECGANGenerator(3)(LAYOUT * 2), "layout must be one-hot: the classes of a pixel sum to 1, got 2"),
        (lambda: ECGANGenerator(3)(torch.full((1, 3, 2, 2), 1 / 3)), "layout must be one-hot"),
        (lambda: ECGANGenerator(3)(torch.tensor([2, 0, -1]).view(1, 3, 1, 1)), "layout must be one-hot: 0 or 1"),
        (lambda: ECGANGenerator(3)(torch.full((1, 3, 2, 2), math.nan)), "layout must be one-hot"),
        (lambda: ECGANGenerator(3)(LAYOUT.argmax(1)), r"layout must have shape \(any, 3, any, any\) for n_classes"),
        (lambda: ECGANGenerator(3)(None), "layout must be a one-hot tensor, got NoneType"),
        (lambda: MultiModalDiscriminator(3)(LAYOUT, None, None), "image and edge must not both be None"),
        (lambda: MultiModalDiscriminator(3)(LAYOUT, IMAGE, None), r"image must have shape \(2, 3, 6, 5\) for layout"),
        (lambda: MultiModalDiscriminator(3)(LAYOUT, None, MAPS[..., 1:]), r"edge must have shape \(2, 1, 6, 5\) for layout"),
        (lambda: MultiModalDiscriminator(3, n_scales=0), "n_scales must be an integer of at least 1"),
        (lambda: ECGAN(None, nn.Identity()), "generator must be a torch.nn.Module, got NoneType"),
        (lambda: gan(features=1), "features must be callable, got int"),
        (lambda: gan(weights={"vgg": 1}), "weights must be of gan, feature, .* got 'vgg'"),
        (lambda: gan(weights={"gan": -1}), r"weights\['gan'\] must be at least 0, got -1"),
        (lambda: gan(weights=[1]), "weights must be a mapping"),
        (lambda: gan().generator_loss(LAYOUT, IMAGE + 1.1), r"image must be in \[-1, 1\], got values such as"),
        (lambda: gan().generator_loss(LAYOUT, IMAGE * math.nan), r"image must be in \[-1, 1\], got values such as nan"),
        (lambda: gan().generator_loss(LAYOUT, IMAGE[:1]), r"image must have shape \(2, any, 6, 5\) for layout"),
        (lambda: gan().generator_loss(LAYOUT, IMAGE.repeat(1, 2, 1, 1)), r"generator\(layout\).image must have shape \(2, 2, 6, 5\)"),
        (lambda: gan().discriminator_loss(LAYOUT, IMAGE, edge=MAPS[..., 1:]), r"edge must have shape \(2, 1, 6, 5\) for layout"),
        (lambda: gan().discriminator_loss(LAYOUT, IMAGE, edge=MAPS + 2), r"edge must be in \[0, 1\]"),
        (lambda: gan().fit([(LAYOUT, IMAGE)], 0), "n_steps must be an integer of at least 1"),
        (lambda: gan().fit([(LAYOUT, IMAGE)], 1, lr_g=0), "lr_g must be greater than 0"),
        (lambda: gan().fit([(LAYOUT, IMAGE)], 1, betas=(0, 1)), r"betas\[1\] must be less than 1"),
        (lambda: gan().fit([(LAYOUT, IMAGE)], 1, betas=0.9), "betas must be two numbers"),
        (lambda: gan().fit([LAYOUT], 1), r"batches must give \(layout, image\)"),
        (lambda: gan().fit([], 1), "batches must give 1 batches, ended after 0"),
        (lambda: gan().fit(iter([(LAYOUT, IMAGE)]), 2), "ended after 1: pass a DataLoader or a list"),
        (lambda: gan().fit(None, 2), "batches must be an iterable"),
        (lambda: gan().sample(LAYOUT.float() / 2), "layout must be one-hot"),
        (lambda: ECGAN(nn.Identity(), nn.Identity()).fit([], 1), "generator must have parameters to train"),
        (lambda: featureless().generator_loss(LAYOUT, IMAGE), "discriminator must return features before its scores"),
        (lambda: edges(IMAGE - 1), r"image must be in \[0, 1\]"),
        (lambda: edges(IMAGE[0]), "image must have shape"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_of_another_kind_is_refused(as_a_user):
    class Other(nn.Module):
        def forward(self, layout, generator=None):
            return layout

    with pytest.raises(ValueError, match="generator must return an ECGANOutput, got Tensor"):
        ECGAN(Other(), nn.Identity()).sample(LAYOUT)
    assert ECGANOutput._fields == ("image", "coarse", "edge", "features", "label_logits")
