"Streams of data that do not fit into memory train the same network as streams of data that do"

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from hctrain import (
    SSLALM,
    LoaderStreams,
    RateGap,
    StochasticGhost,
    Streams,
    SwitchingSubgradient,
    WeightedBCE,
    positive_rate,
)
from hctrain.train import train

GEN = torch.Generator().manual_seed(0)
X, G = torch.randn(300, 3, generator=GEN), torch.arange(300) % 3
Y = (X.sum(1) + .5 * G > 0).float()


class Rows(Dataset):
    "Rows that are made one at a time, as from files"
    def __len__(self):
        return 300

    def __getitem__(self, i):
        return X[i], int(Y[i])


def mapped(folder):
    "The table on disk"
    at = np.memmap(folder / "x.bin", dtype=np.float32, mode="w+", shape=tuple(X.shape))
    at[:] = X.numpy()
    return torch.from_numpy(at)


def trained(streams, method, steps=12, **options):
    "The weights after some steps"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    gaps = RateGap(positive_rate, 3, weights=streams.weights)
    train(model, method(model.parameters()), WeightedBCE(streams.weights), gaps, streams, steps=steps, progress=False,
          **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


METHODS = [lambda p: SSLALM(p, m=3), lambda p: SwitchingSubgradient(p, m=3), lambda p: StochasticGhost(p, m=3)]

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("replacement", [True, False])
def test_where_the_rows_come_from_does_not_matter(method, replacement, tmp_path):
    want = trained(Streams(X, Y, G, 4, replacement=replacement), method)
    for streams in (LoaderStreams(Rows(), G, 4, replacement=replacement),
                    Streams(mapped(tmp_path), Y, G, 4, replacement=replacement)):
        assert torch.equal(trained(streams, method), want)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_where_it_was_and_not_where_its_workers_were(workers, tmp_path):
    make = lambda: LoaderStreams(Rows(), G, 4, num_workers=workers)
    want, file = trained(make(), METHODS[0], steps=12), tmp_path / "run.pt"
    trained(make(), METHODS[0], steps=5, checkpoint=file)
    assert torch.equal(trained(make(), METHODS[0], steps=12, checkpoint=file, resume=True), want)


@pytest.mark.parametrize("k", [1, 4])
def test_a_run_resumes_in_the_middle_of_what_was_gathered(k):
    whole = Streams(X, Y, G, 4)
    truth = [whole.draw(k) for _ in range(40)]
    for t in (0, 1, 17, 39):
        part = Streams(X, Y, G, 4)
        part.cache = 10 * k * 12 * 12                 # eleven draws
        part.load_state_dict({**whole.state_dict(), "t": t})
        for want in truth[t:]:
            for b, w in zip(part.draw(k), want, strict=True):
                assert torch.equal(b.x, w.x) and torch.equal(b.y, w.y) and torch.equal(b.g, w.g)
                b.x.zero_()


def test_batches_drawn_in_inference_mode_can_be_followed_by_training():
    streams = Streams(X, Y, G, 4)
    with torch.inference_mode():
        streams.draw()
    model = nn.Linear(3, 1)
    model(streams.draw()[0].x).sum().backward()
    assert model.weight.grad is not None


def test_reading_that_failed_is_tried_again():
    class Sometimes(Rows):
        fails = True

        def __getitem__(self, i):
            if self.fails:
                raise OSError("not there")
            return super().__getitem__(i)
    rows, want = Sometimes(), Streams(X, Y, G, 4).draw()
    streams = LoaderStreams(rows, G, 4)
    with pytest.raises(OSError):
        streams.draw()
    rows.fails = False
    assert streams.t == 0 and torch.equal(streams.draw()[3].x, want[3].x)
