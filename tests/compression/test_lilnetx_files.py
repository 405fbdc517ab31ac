"""LilNetX's files: sizes against entropies, exact weights on the other side, and what is refused."""

import copy
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn

from posterity._files import pack_tensors, seal, unpack_tensors, unseal
from posterity.compression import FactorizedPrior, LatentNet, slice_norm
from posterity.compression.latent_prior import decoded, encoded

FIXTURE = Path(__file__).parent / "fixtures" / "lilnetx-v1.bin"


class Tied(nn.Module):
    """A head tied to an embedding, and a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.again, self.head.weight = self.twice, self.embed.weight


CASES = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, (3, 1), groups=3), nn.Linear(48, 5)),
    "conv3d": lambda: nn.Conv3d(1, 4, 2),
    "tied": Tied,
}  # fmt: skip


def case(name: str) -> tuple[nn.Module, LatentNet]:
    torch.manual_seed(0)
    net = CASES[name]()
    return net, LatentNet(net)


def rows(weight: Tensor) -> Tensor:
    return weight.detach().reshape(-1, math.prod(weight.shape[2:]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_file_is_the_plain_network(name, dtype):
    net, lat = case(name)
    net, lat = net.to(dtype), lat.to(dtype)
    plain, data = lat.to_plain(), lat.compress()
    assert data == lat.compress() == copy.deepcopy(lat).compress()
    before = copy.deepcopy(net.state_dict())
    back = LatentNet.decompress(net, data)
    assert back.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
        assert back.state_dict()[key].dtype == value.dtype
        assert torch.equal(net.state_dict()[key], before[key])
    assert sum(lat.sizes().values()) == len(data)


def test_latents_take_what_their_columns_entropy_says():
    torch.manual_seed(0)
    lat = LatentNet(nn.Sequential(nn.Conv2d(60, 90, 3), nn.Linear(200, 90)))
    with torch.no_grad():
        for latent in lat.latents().values():
            latent.mul_(torch.rand_like(latent).square())
    ideal, columns = 0.0, 0
    for latent in lat.latents().values():
        for column in rows(latent).round().T:
            ideal += entropy(column.unique(return_counts=True)[1], base=2) * len(column) / 8
            columns += 1
    size = lat.sizes()
    assert ideal <= size["latents"] <= 1.01 * ideal + 64 * columns
    assert size["tables"] < 30 * columns
    assert size["decoders"] == 4 * (81 + 1)


def test_columns_come_back_with_either_table():
    rng = np.random.default_rng(0)
    columns = [
        rng.integers(-3, 4, 500), np.full(7, -5), np.array([-(2**31) + 1, 2**31 - 1, 0, 0]), np.array([9]),
        rng.integers(-(10**6), 10**6, 2000), np.round(rng.normal(0, 40, 800)).astype(np.int64), np.array([0, 10**7]),
    ]  # fmt: skip
    smooth = columns[5]
    span = np.arange(smooth.min(), smooth.max() + 1)
    mass = np.exp(-((span / 40) ** 2) / 2)
    masses = [None] * 5 + [(int(span[0]), mass), None]
    lengths = [len(column) for column in columns]
    for chances in ([None] * 7, masses):
        tables, stream = encoded(columns, chances)
        for got, want in zip(decoded(tables, stream, lengths), columns, strict=True):
            np.testing.assert_array_equal(got, want)
    # a poor density is not taken: nothing changes
    flat = [None] * 5 + [(int(span[0]), (span == span[0]) + 1e-9), None]
    assert encoded(columns, flat) == encoded(columns, [None] * 7)
    few = [np.round(rng.normal(0, 1.2, 2000)).astype(np.int64)]  # counts take two bytes, shares of 2**8 one
    span = np.arange(few[0].min(), few[0].max() + 1)
    mass = np.exp(-((span / 1.2) ** 2) / 2)
    plain, learned = encoded(few, [None]), encoded(few, [(int(span[0]), mass)])
    assert len(learned[0]) < len(plain[0])
    assert sum(map(len, learned)) < sum(map(len, plain))
    np.testing.assert_array_equal(decoded(*learned, [2000])[0], few[0])


def stored() -> LatentNet:
    """The network of the stored file, from closed forms."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    lat = LatentNet(net)
    with torch.no_grad():
        for i, p in enumerate(lat.parameters()):
            p.copy_((torch.arange(p.numel()) * 7 % 11 - 5).reshape(p.shape) * (0.5 if i % 2 else 0.25))
    return lat


def test_a_stored_file_is_read_and_written_by_this_version():
    lat = stored()
    data = FIXTURE.read_bytes()
    back = LatentNet.decompress(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)), data
    )
    for got, want in zip(back.state_dict().values(), lat.to_plain().state_dict().values(), strict=True):
        assert torch.equal(got, want)
    latent, decoder = rows(lat.latents()["0"]).round().double(), lat.decoder("0").detach().double()
    torch.testing.assert_close(rows(back[0].weight).double(), latent @ decoder)
    assert lat.compress() == data


def test_bytes_do_not_depend_on_threads():
    _, lat = case("conv")
    threads = torch.get_num_threads()
    try:
        made = []
        for n in (1, 2):
            torch.set_num_threads(n)
            made.append(
                (lat.compress(), pickle.dumps([p.detach().numpy() for p in lat.to_plain().parameters()]))
            )
    finally:
        torch.set_num_threads(threads)
    assert made[0] == made[1]


LINEAR = nn.Linear(3, 2)
LAT = LatentNet(LINEAR, generator=torch.Generator().manual_seed(0))
DATA = LAT.compress()


def spoiled(value: float) -> LatentNet:
    lat = LatentNet(nn.Sequential(nn.Linear(2, 2)))
    with torch.no_grad():
        lat.latents()["0"][0, 0] = value
    return lat


def altered(**changes) -> bytes:
    about, tensors, blobs = unpack_tensors(unseal(b"PLNX", DATA))
    about, tensors = about | changes.pop("about", {}), tensors | changes.pop("tensors", {})
    return seal(b"PLNX", pack_tensors(about, tensors, blobs | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentNet(nn.ReLU()), "must have a layer of Linear, .*got ReLU"),
        (lambda: LatentNet(3), "net must be an nn.Module, got int"),
        (lambda: LatentNet(LINEAR, layers=["x"]), "layers must name layers of the model, got 'x'"),
        (lambda: LatentNet(LINEAR, boundary=0), "boundary must be greater than 0"),
        (lambda: LatentNet(LINEAR, start="weights", step=-1.0), "step must be greater than 0"),
        (lambda: LatentNet(LINEAR, step=1.0), "step must be None with start='random'"),
        (lambda: LatentNet(LINEAR, start="zeros"), "start must be one of 'random', 'weights'"),
        (lambda: LatentNet(LAT), "net must not be wrapped"),
        (lambda: LatentNet(nn.Sequential(LAT)), "net must not be wrapped"),
        (lambda: LatentNet(nn.Linear(2, 2, dtype=torch.complex64)), "net must have real weights, got torch.complex64"),
        (lambda: LatentNet(nn.Linear(0, 2)), "net must have a layer with weights"),
        (lambda: LatentNet(spoiled(math.nan).to_plain(), start="weights"), "net must have finite weights, .*'0'"),
        (lambda: LAT.decoder("x"), "layer must be one of"),
        (lambda: spoiled(math.inf).compress(), "latents of '0' must be finite"),
        (lambda: spoiled(2.0**31).compress(), "latents of '0' must lie in int32"),
        (lambda: LatentNet.decompress(LAT, DATA), "net must not be wrapped"),
        (lambda: LatentNet.decompress(LINEAR, "text"), "data must be bytes, got str"),
        (lambda: LatentNet.decompress(LINEAR, b"other" * 9), "data must begin with b'PLNX'"),
        (lambda: LatentNet.decompress(LINEAR, DATA[:-1]), "data must have .* cut short"),
        (lambda: LatentNet.decompress(LINEAR, DATA[:4] + b"\x02" + DATA[5:]), "data must be of version 1.1"),
        (lambda: LatentNet.decompress(LINEAR, DATA[:-1] + bytes([DATA[-1] ^ 1])), "data must have the checksum"),
        (lambda: LatentNet.decompress(nn.Linear(4, 2), DATA), r"data must fit Linear, .*'weight' of shape \(2, 3\)"),
        (lambda: LatentNet.decompress(nn.Linear(3, 2, bias=False), DATA), "data must fit Linear, got 'bias'"),
        (lambda: LatentNet.decompress(nn.Sequential(LINEAR), DATA), "data must fit Sequential, .*'weight'"),
        (lambda: LatentNet.decompress(LINEAR, altered(tables=b"")), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(tables=b"\xff" * 40)), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(tables=b"\x81\xff\xff\x01\x00" * 9)), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(latents=b"\x07" * 64)), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(latents=b"\x07" * 3)), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(about={"layers": [[[2, 3], "weight"]] * 2})), "data must"),
        (lambda: LatentNet.decompress(LINEAR, altered(about={"layers": 3})), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(about={"layers": [[[2, 3]]]})), "data must be a latent network"),
        (lambda: LatentNet.decompress(LINEAR, altered(tensors={"decoder linear": torch.ones(3)})), "data must be a latent network"),
        (lambda: FactorizedPrior(0), "channels must be an integer of at least 1"),
        (lambda: FactorizedPrior(2).bits(torch.ones(3)), r"q must have shape \(any, 2\)"),
        (lambda: FactorizedPrior(2).cdf(torch.ones(3, 2).long()), "x must be a floating-point"),
        (lambda: slice_norm(torch.ones(3)), r"weight must have shape \(out, in, \*k\)"),
        (lambda: slice_norm(torch.ones(3, 3), 0.5), "ord must be in"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_damage_anywhere_is_an_error():
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(DATA)
        damaged[rng.integers(len(DATA))] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError, match="data must"):
            LatentNet.decompress(LINEAR, bytes(damaged))


def test_without_constriction_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match=r"posterity\[compression\]"):
        LAT.compress()
