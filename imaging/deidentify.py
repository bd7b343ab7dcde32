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
from typing import Any, BinaryIO, cast

from imaging.archive import Member, is_zip, open_members
from imaging.deidentify_dicom import PROFILE, Cleaned, Refused, clean_object
from imaging.deidentify_formats import clean_file, clean_path, clean_voxels, form_of
from imaging.deidentify_rules import EDITION
from imaging.dicom_file import looks_like_dicom, refuse_commands
from imaging.dicom_header import patient_key
from imaging.errors import ScanError
from imaging.identity import Policy, Pseudonyms
from imaging.limits import CHUNK_BYTES, MAX_FILE_BYTES, read_capped, shared_reads
from imaging.volume_files import SNIFF_BYTES, Form, detached
from imaging.volume_files import form_of as form_of_scan

_EPOCH = (1980, 1, 1, 0, 0, 0)
_ANOTHER = "quarantined: another image of its series is"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Why a file that was sent is not kept."""

    reason: str
    sop_uid: str = ""
    """Mapped."""


@dataclass(frozen=True, slots=True)
class Deidentified:
    """A cleaned upload."""

    path: Path
    places: tuple[int, ...]
    """Where each file that is in it was among the files sent in."""
    left_out: Mapping[int, LeftOut]
    """By place, each file that is not in it."""
    series_uids: frozenset[str] = frozenset()
    """Mapped."""
    patients: frozenset[str] = frozenset()
    """Pseudonyms."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What was done, for the record."""
    was_jpeg: bool = False
    """It is kept as a PNG of what the JPEG shows."""

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

    def as_sent(self, value: Any) -> Any:
        """What a reader of the cleaned upload says, with each `member` as a place in what came."""
        if isinstance(value, Mapping):
            told = {name: self.as_sent(part) for name, part in value.items()}
            if isinstance(value.get("member"), int):
                told["member"] = self.places[value["member"]]
            if "members" in value and all(isinstance(one, int) for one in value["members"]):
                told["members"] = [self.places[one] for one in value["members"]]
            return told
        return [self.as_sent(part) for part in value] if isinstance(value, list | tuple) else value

    def explained(self, members: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The files that are not used: what a reader says of those kept, and those left out."""
        told: list[dict[str, Any]] = self.as_sent(list(members))
        told += [
            {"member": place, "reason": one.reason, "sop_uid": one.sop_uid}
            for place, one in self.left_out.items()
        ]
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
        start = file.read(SNIFF_BYTES)
    if is_zip(start):
        with open_members(path) as members:
            return _clean_zip(members, target, names, policy, facts)
    if (form := form_of(start)) is not None:
        clean_path(path, target, form)
        return Deidentified(target, (0,), {}, facts=facts, was_jpeg=form == "jpeg")
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


def _clean_zip(
    members: Sequence[Member],
    target: Path,
    names: Pseudonyms,
    policy: Policy,
    facts: Mapping[str, str],
) -> Deidentified | None:
    forms = [form_of_scan(member) for member in members]
    if "zip" in forms:
        raise ScanError("archive_unsafe", f"file {forms.index('zip')} is itself a zip")
    if "dicom" in forms:
        kept = _Kept()
        # Each is parsed twice: for its elements' number, and in full.
        with _new_zip(target) as archive, shared_reads(2 * len(members)):
            for place, member in enumerate(members):
                if forms[place] == "dicom":
                    kept.take(archive, place, member, names, policy)
                else:
                    kept.left_out[place] = LeftOut("not a DICOM object")
        if kept.drop_series():
            _rewrite(target, kept.series)
        return kept.result(target, facts)
    places = [place for place, form in enumerate(forms) if form is not None]
    if len(places) != 1:
        return None  # the reader says what it misses
    return _clean_volume(members, forms, places[0], target, facts)


class _Kept:
    """What is known of a zip's DICOM objects while they are gone through."""

    def __init__(self) -> None:
        self.series: dict[int, str] = {}
        """Place and mapped series UID of the files that are kept."""
        self.patients: dict[int, str] = {}
        self.sop_uids: dict[int, str] = {}
        self.left_out: dict[int, LeftOut] = {}
        self.quarantined: dict[str, str] = {}
        """Mapped series UID and reason."""

    def take(
        self,
        archive: zipfile.ZipFile,
        place: int,
        member: Callable[[], BinaryIO],
        names: Pseudonyms,
        policy: Policy,
    ) -> None:
        """Clean one object into the archive, or say why not."""
        with member() as file:
            found = _cleaned(file, names, policy)
        if isinstance(found, Refused):
            self.left_out[place] = LeftOut(found.reason, found.sop_uid)
            if found.is_quarantined:
                self.quarantined.setdefault(found.series_uid, found.reason)
            return
        archive.writestr(_entry(place), found.data)
        self.series[place], self.patients[place] = found.series_uid, found.patient
        self.sop_uids[place] = found.sop_uid

    def drop_series(self) -> list[int]:
        """Leave out whole series of which an image is quarantined: half a series is no scan."""
        dropped = [place for place, uid in self.series.items() if uid in self.quarantined]
        for place in dropped:
            self.left_out[place] = LeftOut(_ANOTHER, self.sop_uids[place])
            del self.series[place], self.patients[place]
        return dropped

    def result(self, target: Path, facts: Mapping[str, str]) -> Deidentified | None:
        if not self.series:
            if self.quarantined:
                reasons = sorted(set(self.quarantined.values()))
                raise ScanError("burned_in_annotation", "; ".join(reasons[:3]))
            return None
        return Deidentified(
            path=target,
            places=tuple(sorted(self.series)),
            left_out=self.left_out,
            series_uids=frozenset(filter(None, self.series.values())),
            patients=frozenset(filter(None, self.patients.values())),
            facts=facts,
        )


def _cleaned(file: BinaryIO, names: Pseudonyms, policy: Policy) -> Cleaned | Refused:
    start = file.read(SNIFF_BYTES)
    try:
        refuse_commands(start)  # before megabytes of zeros are unpacked
    except ScanError as error:
        return Refused(error.detail, is_quarantined=False)
    return clean_object(read_capped(file, MAX_FILE_BYTES, start=start), names, policy)


def _clean_volume(
    members: Sequence[Member],
    forms: Sequence[Form | None],
    place: int,
    target: Path,
    facts: Mapping[str, str],
) -> Deidentified:
    """The only volume of a zip, and the file of its voxels where they lie beside it."""
    form = forms[place]
    assert form in ("nifti", "nrrd", "metaimage")
    beside = detached(members, forms, place)
    places = sorted({place, beside[1]} if beside else {place})
    with _new_zip(target) as archive:
        for one in places:
            with (
                members[one]() as dirty,
                archive.open(_entry(one), "w", force_zip64=True) as clean,
            ):
                if one == place:
                    clean_file(dirty, cast(BinaryIO, clean), form)
                else:
                    assert beside is not None
                    clean_voxels(dirty, cast(BinaryIO, clean), beside[0])
    others = [other for other in range(len(members)) if other not in places]
    left_out = {other: LeftOut("not a scan") for other in others}
    return Deidentified(target, tuple(places), left_out, facts=facts)


def _rewrite(path: Path, places: Iterable[int]) -> None:
    """The zip again, with these files alone."""
    draft = path.with_suffix(".draft")
    with zipfile.ZipFile(path) as source, _new_zip(draft) as target:
        for place in places:
            with (
                source.open(_entry(place).filename) as old,
                target.open(_entry(place), "w", force_zip64=True) as new,
            ):
                while chunk := old.read(CHUNK_BYTES):
                    new.write(chunk)
    draft.replace(path)


def _new_zip(path: Path) -> zipfile.ZipFile:
    """Not compressed: at 45 ms a CT slice that took longer than all the rest of the intake."""
    return zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)


def _entry(place: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(f"{place:06d}", _EPOCH)
    entry.compress_type = zipfile.ZIP_STORED
    entry.external_attr = 0o600 << 16
    return entry
