"""An upload without identities: what is stored instead of what was sent.

A zip becomes a zip of the images in it, in their order, under names of ours; what cannot be cleaned
is left out and explained. A file of a format that is not known here is not cleaned at all, so that
whoever reads it must refuse it (fail closed).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from imaging.archive import is_zip, open_members
from imaging.deidentify_dicom import PROFILE, Cleaned, Refused, clean_object
from imaging.deidentify_formats import Form, clean_file, clean_path, form_of
from imaging.deidentify_rules import EDITION
from imaging.dicom_header import looks_like_dicom, patient_key
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.limits import CHUNK_BYTES, MAX_FILE_BYTES, read_capped

_EPOCH = (1980, 1, 1, 0, 0, 0)
_SNIFF_BYTES = 1024
_VOLUMES: set[Form | None] = {"nifti", "nrrd", "metaimage"}
_ANOTHER = "quarantined: another image of its series is"


@dataclass(frozen=True, slots=True)
class Deidentified:
    """A cleaned upload."""

    path: Path
    places: tuple[int, ...]
    """Where each file that is in it was among the files sent in."""
    left_out: Mapping[int, str]
    """Place and reason of each file that is not in it."""
    series_uids: frozenset[str] = frozenset()
    """Mapped."""
    patients: frozenset[str] = frozenset()
    """Pseudonyms."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What was done, for the record."""

    def patient_of(self, key: str) -> str:
        """The pseudonym whose `dicom_header.patient_key` this is; empty for none of them."""
        return next((name for name in self.patients if patient_key(name) == key), "")

    def series_named(self, series_uid: str, names: Pseudonyms) -> str:
        """The mapped UID of a series that is named as it was sent, or as it is mapped.

        Or by what either is mapped to, which is what a service may keep of a request.
        """
        if series_uid in self.series_uids:
            return series_uid
        twice = {names.uid(uid): uid for uid in self.series_uids}
        return twice.get(series_uid) or names.uid(series_uid)

    def explained(self, members: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What a reader of the cleaned upload says of its files, in terms of what was sent."""
        told = [{**member, "member": self.places[member["member"]]} for member in members]
        told += [{"member": place, "reason": reason} for place, reason in self.left_out.items()]
        return sorted(told, key=lambda one: int(one["member"]))


def deidentify_upload(
    path: Path, target: Path, names: Pseudonyms, policy: Policy
) -> Deidentified | None:
    """Write a file without identities.

    Args:
        path: What was sent in.
        target: Where to write; the bytes follow from those of `path`, the key and the policy.
        names: Gives pseudonyms.
        policy: What the site wants.

    Returns:
        What was kept; None where nothing in it is of a kind that can be cleaned.

    Raises:
        ScanError: `burned_in_annotation`, `too_large`, `archive_unsafe`, `truncated_file` and what
            else tells that it cannot be a scan.
    """
    facts = {"profile": PROFILE, "table": EDITION, "dates": policy.dates}
    with path.open("rb") as file:
        start = file.read(_SNIFF_BYTES)
    if is_zip(start):
        with open_members(path) as members:
            kept = _Kept(facts)
            _clean_members(members, target, names, policy, kept)
        return kept.result(target)
    if (form := form_of(start)) is not None:
        clean_path(path, target, form)
        return Deidentified(target, (0,), {}, facts=facts)
    if not looks_like_dicom(start):
        return None
    with path.open("rb") as file:
        found = clean_object(read_capped(file, MAX_FILE_BYTES), names, policy)
    if isinstance(found, Refused):
        if found.is_quarantined:
            raise ScanError("burned_in_annotation", found.reason)
        return None
    target.write_bytes(found.data)
    patients = frozenset(filter(None, [found.patient]))
    return Deidentified(target, (0,), {}, frozenset([found.series_uid]), patients, facts)


class _Kept:
    """What is known of a zip's files while they are gone through."""

    def __init__(self, facts: Mapping[str, str]) -> None:
        self.facts = facts
        self.places: dict[int, str] = {}
        """Place and mapped series UID of the files that are kept."""
        self.patients: dict[int, str] = {}
        self.left_out: dict[int, str] = {}
        self.quarantined: dict[str, str] = {}
        """Mapped series UID and reason."""

    def refuse(self, place: int, refused: Refused) -> None:
        self.left_out[place] = refused.reason
        if refused.is_quarantined:
            self.quarantined.setdefault(refused.series_uid, refused.reason)

    def drop_series(self) -> list[int]:
        """Leave out whole series of which an image is quarantined: half a series is no scan."""
        dropped = [place for place, uid in self.places.items() if uid in self.quarantined]
        for place in dropped:
            self.left_out[place] = _ANOTHER
            del self.places[place]
            self.patients.pop(place, None)
        return dropped

    def result(self, target: Path) -> Deidentified | None:
        if not self.places:
            if self.quarantined:
                reasons = sorted(set(self.quarantined.values()))
                raise ScanError("burned_in_annotation", "; ".join(reasons[:3]))
            return None
        return Deidentified(
            path=target,
            places=tuple(sorted(self.places)),
            left_out=self.left_out,
            series_uids=frozenset(filter(None, self.places.values())),
            patients=frozenset(filter(None, self.patients.values())),
            facts=self.facts,
        )


def _clean_members(
    members: Sequence[Callable[[], BinaryIO]],
    target: Path,
    names: Pseudonyms,
    policy: Policy,
    kept: _Kept,
) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for place, member in enumerate(members):
            with member() as file:
                start = file.read(_SNIFF_BYTES)
            if is_zip(start):
                raise ScanError("archive_unsafe", f"file {place} of the zip is itself a zip")
            if (form := form_of(start)) in _VOLUMES:
                assert form is not None
                try:
                    _clean_volume(member, archive, place, form, target.with_suffix(".member"))
                    kept.places[place] = ""
                except ScanError as error:
                    if error.code == "too_large":
                        raise
                    kept.left_out[place] = error.detail
            elif looks_like_dicom(start):
                with member() as file:
                    found = clean_object(read_capped(file, MAX_FILE_BYTES), names, policy)
                if isinstance(found, Cleaned):
                    archive.writestr(_entry(place), found.data)
                    kept.places[place], kept.patients[place] = found.series_uid, found.patient
                else:
                    kept.refuse(place, found)
            else:
                kept.left_out[place] = "not a scan"
    if kept.drop_series():
        _rewrite(target, kept.places)


def _clean_volume(
    member: Callable[[], BinaryIO], archive: zipfile.ZipFile, place: int, form: Form, draft: Path
) -> None:
    """Clean a volume beside the zip first, so that a damaged one leaves nothing in it."""
    try:
        with member() as dirty, draft.open("wb") as clean:
            clean_file(dirty, clean, form)
        with draft.open("rb") as old, archive.open(_entry(place), "w", force_zip64=True) as new:
            while chunk := old.read(CHUNK_BYTES):
                new.write(chunk)
    finally:
        draft.unlink(missing_ok=True)


def _rewrite(path: Path, places: Iterable[int]) -> None:
    """The zip again, with these files alone."""
    draft = path.with_suffix(".draft")
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for place in places:
            with (
                source.open(_entry(place).filename) as old,
                target.open(_entry(place), "w", force_zip64=True) as new,
            ):
                while chunk := old.read(CHUNK_BYTES):
                    new.write(chunk)
    draft.replace(path)


def _entry(place: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(f"{place:06d}", _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o600 << 16
    return entry
