"""The codec stage: steps lie where the agreement is crossed, and a bundle's codecs do what its manifest says."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.codecs import AGREEMENTS, crossings
from export.pipeline import Exported
from runtime.codec import CODECS, Codecs, find_rate
from runtime.levels import Levels

STEPS = np.geomspace(0.01, 1, 9)


def kept(centre: float, width: float, ceiling: float) -> np.ndarray:
    """Agreement at STEPS when the share of changed answers is a normal distribution function of the log step."""
    return np.array([ceiling * (1 - NormalDist(np.log(centre), width).cdf(np.log(step))) for step in STEPS])


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.5), st.floats(0.3, 1.5), st.sampled_from([1.0, 0.99]))
def test_crossings_are_found_again(centre: float, width: float, ceiling: float) -> None:
    (found,) = crossings(STEPS, kept(centre, width, ceiling), ceiling, 1000, [0.9])
    allowed = (0.1 - (1 - ceiling)) / ceiling
    expected = np.clip(np.exp(NormalDist(np.log(centre), width).inv_cdf(allowed)), STEPS[0] / 2, STEPS[-1])
    assert abs(np.log(found / expected)) < 0.25


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=9, max_size=9), st.floats(0.5, 1))
def test_more_agreement_never_takes_a_coarser_step(shares: list[float], ceiling: float) -> None:
    found = crossings(STEPS, np.array(sorted(shares, reverse=True)), ceiling, 100, AGREEMENTS)
    assert (np.diff(found) <= 1e-12).all()
    assert ((found >= STEPS[0] / 2) & (found <= STEPS[-1])).all()


def test_a_ceiling_below_what_is_wanted_still_gives_a_step() -> None:
    found = crossings(STEPS, kept(0.2, 0.5, 0.9), 0.9, 200, [0.95])
    assert STEPS[0] / 2 <= found[0] < 0.2


@pytest.mark.parametrize("cut", [1, 2])
def test_rates_were_measured_and_get_dearer(exported: Exported, cut: int) -> None:
    spec = next(spec for spec in exported.bundle.manifest.cuts[cut].codecs if spec.name == "transform")
    assert [rate.parameter for rate in spec.rates] == [round(100 * wanted) for wanted in AGREEMENTS]
    sizes = [rate.bytes_p50 for rate in spec.rates]
    assert None not in sizes
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    for rate in spec.rates:
        assert rate.n == exported.bundle.manifest.provenance.frames["judge"]
        assert rate.agreement_low <= rate.agreement <= rate.agreement_high  # type: ignore[operator]


def test_a_bundles_codec_decodes_what_it_encodes(exported: Exported) -> None:
    bundle = exported.bundle
    cut = bundle.manifest.cuts[1]
    with np.load(bundle.path / bundle.manifest.golden) as golden:
        features = [frame[np.newaxis] for frame in golden["cut_1"]]
    name, rate = find_rate(bundle, 1, "transform:99")
    codec = Codecs(bundle).get(1, CODECS[name], rate)
    reference: Levels | None = None
    for tensor in [*features, *features]:
        payload, levels = codec.encode_against(tensor, reference)  # type: ignore[attr-defined]
        again, same = codec.decode_against(payload, reference)  # type: ignore[attr-defined]
        assert np.array_equal(levels, same)
        assert again.shape == (1, *cut.shape)
        assert again.dtype == tensor.dtype
        reference = levels


def test_auto_takes_the_transform_where_there_is_one(exported: Exported) -> None:
    name, rate = find_rate(exported.bundle, 1, "auto")
    assert name == "transform"
    chosen = next(codec for codec in exported.bundle.manifest.cuts[1].codecs if codec.name == name).rates[rate]
    assert chosen.agreement is not None
    finest = rate == len(AGREEMENTS) - 1
    assert finest or chosen.agreement >= exported.bundle.manifest.proof["whole_agreement"] - 0.02
    assert find_rate(exported.bundle, 0, "auto") == ("raw", 0)
