"""stAdv: flows move pixels as they say, the smoothness term by hand, failures stay clean, targets are reached."""

from __future__ import annotations

import pytest
import torch

from attacks.spatial import _Search, roughness, warp
from bench.errors import PluginError
from bench.registry import ATTACKS


@pytest.fixture
def victim(lab):
    target = lab.Classifier(lab.convnet(), 5, one_by_one=True)
    images, _ = lab.batch(5)
    return target, images, target.predict(images)


def test_a_flow_moves_pixels():
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    still = torch.zeros(2, 2, 5, 7)
    torch.testing.assert_close(warp(images, still), images)
    down = still.clone()
    down[:, 0] = 1.0
    torch.testing.assert_close(warp(images, down)[:, :, :-1], images[:, :, 1:])
    torch.testing.assert_close(warp(images, down)[:, :, -1], images[:, :, -1])  # the border is repeated
    half = still.clone()
    half[:, 1] = 0.5
    torch.testing.assert_close(
        warp(images, half)[..., :-1], (images[..., :-1] + images[..., 1:]) / 2, rtol=0, atol=1e-6
    )


def test_smoothness_by_hand():
    flow = torch.zeros(1, 2, 2, 2)
    flow[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    # Two neighbours at distance 5, each pair seen from both ends.
    assert abs(float(roughness(flow)) - 20) < 1e-2
    assert float(roughness(flow + 7)) == pytest.approx(float(roughness(flow)), abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_fools_by_moving_or_leaves_alone(lab, victim, optimizer):
    target, images, labels = victim
    attack = ATTACKS.create("stadv", {"optimizer": optimizer, "steps": 25})
    out = lab.run(attack, target, images, labels)
    hit = torch.tensor([p != y for p, y in zip(target.predict(out), labels, strict=True)])
    assert hit.sum() >= 3
    assert torch.equal((out != images).flatten(1).any(1), hit)
    # Pixels come from the image's own neighbourhood: no new extremes.
    assert (attack.excess(images, out) <= 1e-6).all()
    brighter = images.clone()
    brighter[:, 1] += 0.01
    torch.testing.assert_close(attack.excess(images, brighter), torch.full((5,), 0.01))
    hopeless = lab.run(ATTACKS.create("stadv", {"steps": 1, "lr": 1e-6}), target, images, labels)
    assert torch.equal(hopeless, images)


def test_weaker_smoothing_where_the_first_fails(lab, victim):
    target, images, labels = victim
    params = {"tau": 50.0, "steps": 25}

    def hits(searches: int) -> int:
        attack = ATTACKS.create("stadv", {**params, "searches": searches})
        oracle = lab.oracle(target, attack, 5)
        out = attack.run(oracle, images, labels, lab.rng(5))
        assert max(trace.backwards for trace in oracle.traces) <= attack.passes() == searches * 26
        return sum(p != y for p, y in zip(target.predict(out), labels, strict=True))

    assert hits(1) + 2 <= hits(5)


def test_smoothing_goes_on_after_success(lab, victim):
    target, images, labels = victim
    least = []
    for stop in (True, False):
        attack = ATTACKS.create("stadv", {"steps": 40, "stop_when_fooled": stop})
        search = _Search(attack, 0.01, lab.oracle(target, attack, 5), images, torch.tensor(labels))
        attack._adam(search)
        least.append(search.least)
    first, full = least
    assert (full <= first).all() and (full < first).any() and full.isfinite().sum() >= 3


def test_targets_and_the_name_of_cafd(lab, victim):
    target, images, labels = victim
    wrong = [(y + 1) % 5 for y in labels]
    attack = ATTACKS.create("sta", {"target": "next", "steps": 40, "tau": 0.005})
    out = lab.run(attack, target, images, wrong)
    hit = torch.tensor([p == t for p, t in zip(target.predict(out), wrong, strict=True)])
    assert hit.any() and torch.equal((out != images).flatten(1).any(1), hit)
    assert attack.norm is None and attack.eps is None


@pytest.mark.parametrize(
    ("params", "message"),
    [({"steps": 0}, "steps"), ({"optimizer": "sgd"}, "optimizer"), ({"eps": 1}, "unknown parameter 'eps'")],
)
def test_bad_input(params, message):
    with pytest.raises(PluginError, match=message):
        ATTACKS.create("stadv", params)
