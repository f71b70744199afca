"""Puts a variant of the first segment in force: the same bundle, with another file and the exits tested behind it.

Features are aligned, so nothing behind the first segment changes, and the bundle's id stays: packets say which variant
made the features they carry, since it decides how sure an exit must be.
"""

from __future__ import annotations

import msgspec

from runtime.errors import ConfigError
from runtime.manifest import Bundle


def with_variant(bundle: Bundle, number: int) -> Bundle:
    """The bundle as it is with variant `number` of its first segment in force; 0 is the segment itself.

    Raises:
        ConfigError: the bundle has no such variant.
    """
    if number == 0:
        return bundle
    first, *rest = bundle.manifest.segments
    if number > len(first.variants):
        raise ConfigError(f"variant: {number} is not in the bundle, which has {known(bundle)}")
    spec = first.variants[number - 1]
    segment = msgspec.structs.replace(
        first, file=spec.file, macs=spec.macs, max_batch_size=spec.max_batch_size, variants=()
    )
    manifest = msgspec.structs.replace(bundle.manifest, segments=(segment, *rest), exits=spec.exits)
    return Bundle(path=bundle.path, manifest=manifest, id=bundle.id, labels=bundle.labels)


def with_each_variant(bundle: Bundle) -> list[Bundle]:
    """The bundle with each of its variants in force, by number."""
    return [with_variant(bundle, number) for number in range(len(bundle.manifest.segments[0].variants) + 1)]


def known(bundle: Bundle) -> str:
    """The variants that there are, in words."""
    most = len(bundle.manifest.segments[0].variants)
    return "none but 0, the segment itself" if most == 0 else f"0 (the segment itself) to {most}"
