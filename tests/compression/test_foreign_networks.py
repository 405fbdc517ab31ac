"""The domain on networks that nobody here wrote: a ResNet, a MobileNet and a vision transformer of transformers."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posterity.compression import (
    HARP,
    LatentNet,
    allocate_bits,
    channel_saliencies,
    data_flow_couplings,
    error_barrier,
    latency,
    magnitude_mask,
    pack_quantized,
    pack_sparse,
    prune_channels,
    quantize,
    sensitivity,
    shrink,
    unpack_quantized,
    unpack_sparse,
)

pytestmark = pytest.mark.filterwarnings("ignore:channels stay that meet")  # attention, and it says so


def build(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", num_labels=4
        )
        net = transformers.ResNetForImageClassification(config)
    elif name == "mobilenet":
        config = transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32, num_labels=4)
        net = transformers.MobileNetV2ForImageClassification(config)
    else:
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32,
            patch_size=8, num_labels=4,
        )  # fmt: skip
        net = transformers.ViTForImageClassification(config)
    for module in net.modules():  # as if it had been trained: no channel is like another
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
    return net.eval()


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 3])
NAMES = ["resnet", "mobilenet", "vit"]


@torch.no_grad()
def logits(net: nn.Module) -> Tensor:
    return net(IMAGES).logits


def saved(net: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.tell()


@pytest.mark.parametrize("name", NAMES)
def test_pruned_is_the_silenced_network_and_stands_alone(name: str):
    net = build(name)
    before = copy.deepcopy(net.state_dict())
    found = prune_channels(net, IMAGES[:1], 0.25)
    silent = copy.deepcopy(net)
    for coupling, kept in zip(found.couplings, found.kept, strict=True):
        lost = [c for c in range(coupling.n_channels) if c not in set(kept.tolist())]
        for layer in coupling.reads:
            weight = silent.get_submodule(layer).weight.data
            if weight.shape[1] == coupling.n_channels:
                weight[:, lost] = 0
    assert torch.allclose(logits(found.model), logits(silent), atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert found.params[1] < found.params[0] and found.macs[1] < found.macs[0]
    assert saved(found.model) < saved(net)
    assert latency(found.model, IMAGES, n_repeats=1, warmup=0) > 0
    assert type(found.model) is type(net)
    file = io.BytesIO()
    torch.save({"plan": found.plan, "state_dict": found.model.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    again = shrink(build(name), stored["plan"]).eval()
    again.load_state_dict(stored["state_dict"])
    assert torch.equal(logits(again), logits(found.model))
    exported = torch.export.export(found.model, (IMAGES,), strict=False).module()
    assert torch.allclose(exported(IMAGES).logits, logits(found.model), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_of_every_coupling_and_finite(name: str):
    net = build(name)
    couplings = data_flow_couplings(net, IMAGES[:1])
    assert len(couplings) >= {"resnet": 5, "mobilenet": 20, "vit": 2}[name]
    for scores, coupling in zip(channel_saliencies(net, IMAGES[:1]), couplings, strict=True):
        assert scores.shape == (coupling.n_channels,) and bool((scores > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_bits_by_layer_and_back_from_the_file(name: str):
    net = build(name)
    found = sensitivity(net, [(IMAGES, LABELS)], loss_fn=lambda out, y: F.cross_entropy(out.logits, y))
    single = [
        sensitivity(net, [(IMAGES[i : i + 1], LABELS[i : i + 1])], estimator="batch",
                    loss_fn=lambda out, y: F.cross_entropy(out.logits, y)) for i in range(3)
    ]  # fmt: skip
    for layer, trace in found.weight_trace.items():
        assert trace == pytest.approx(sum(s.weight_trace[layer] for s in single) / 3, rel=1e-3, abs=1e-9)
    bits = allocate_bits(found, weight_budget=4, activation_budget=6)
    small = quantize(net, bits.weight_bits, bits.activation_bits, calibration=IMAGES).eval()
    data = pack_quantized(small)
    assert len(data) < 0.6 * saved(net)
    assert torch.equal(logits(unpack_quantized(net, data).eval()), logits(small))


@pytest.mark.parametrize("name", NAMES)
def test_masks_and_barriers(name: str):
    net = build(name)
    mask = magnitude_mask(net, 0.5)
    total = sum(m.numel() for m in mask.values())
    assert sum(int(m.sum()) for m in mask.values()) == total - -(-total // 2)
    state = {key: value * mask.get(key, 1) for key, value in net.state_dict().items()}
    path = error_barrier(net, net.state_dict(), state, lambda m: float(F.cross_entropy(logits(m), LABELS)), n_points=3)  # fmt: skip
    assert path.height >= 0 and len(path.errors) == 3


@pytest.mark.parametrize("name", NAMES)
def test_small_files_of_masked_and_latent_networks(name: str):
    pytest.importorskip("constriction")
    net = build(name)
    mask = magnitude_mask(net, 0.9)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.mul_(mask.get(key, 1))
    data = pack_sparse(net)
    assert len(data) < 0.6 * saved(net)
    assert torch.equal(logits(unpack_sparse(build(name), data).eval()), logits(net))
    harp = HARP(net, 0.3).eval()
    assert torch.allclose(logits(harp.to_plain().eval()), harp(IMAGES).logits, atol=1e-6)
    latent = LatentNet(net, start="weights", boundary=20.0).eval()
    plain = latent.to_plain().eval()
    assert type(plain) is type(net)
    compact = latent.to_compact().eval()
    for each in (compact, copy.deepcopy(compact)):  # padding by the stride of a layer, as MobileNet's
        assert torch.allclose(logits(each), logits(plain), atol=1e-5)
    few = HARP(net, 0.3, granularity="channel").eval()
    assert torch.allclose(few(IMAGES).logits, logits(copy.deepcopy(few.to_compact().eval())), atol=1e-5)
    assert torch.equal(logits(LatentNet.decompress(build(name), latent.compress()).eval()), logits(plain))
