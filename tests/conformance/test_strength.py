"""On all embedded test digits, at equal budget and steps, ours fools as many as any library, or nearly."""

from __future__ import annotations

import pytest

from benchmarks.attack_strength import cases, compare, digits, victim

CASES = {case.label: case for case in cases(steps=10)}
# Another algorithm under the name: its step halves at every other checkpoint at least (docs/attack_strength.md).
OTHER = {("apgd on ce, 10 steps", "adv_lib")}


@pytest.fixture(scope="module")
def mini():
    return victim("mini_vgg"), *digits(500)


@pytest.mark.slow
@pytest.mark.parametrize(
    "label", ["bim, 10 steps", "mi_fgsm, 10 steps", "pgd, 10 steps", "apgd on ce, 10 steps"]
)
def test_not_weaker(mini, label):
    rows = [row for row in compare(CASES[label], *mini, starts=3) if (label, row.library) not in OTHER]
    assert rows, "foolbox or pyautoattack is always there"
    for row in rows:
        assert row.points >= -1 or row.verdict == "within chance", row
        if row.starts == 1:
            # Nothing is drawn, which leaves no room for chance: so few images may differ at all.
            assert row.only_theirs <= 0.04 * row.images, row
        # Where all or none are fooled, nothing is compared.
        assert 0.2 < row.theirs < 0.98, row


@pytest.mark.slow
def test_a_weak_attack_is_called_weaker(mini):
    target, images, labels = mini
    whole = CASES["mi_fgsm, 10 steps"]
    name, params = whole.ours
    case = type(whole)(
        whole.label, (name, {**params, "alpha": "1/1020"}), whole.others, whole.eps, whole.norm
    )
    assert {row.verdict for row in compare(case, target, images[:200], labels[:200])} == {"weaker"}
