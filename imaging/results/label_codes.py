"""A label's name to the standard's coded terms (PS3.16: CID 7150 categories, SNOMED CT types).

A bundle names its labels freely. A name that stands in `TERMS` (letters and digits only, any case)
gets its SNOMED CT code. Any other gets the stated fallback: category "Spatial and Relational
Concept" (SNOMED CT) and a private type in the scheme `99PCRL` whose meaning is the name itself, so
that no wrong organ is ever claimed. To code a further label, add its line here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

PRIVATE_SCHEME = "99PCRL"
MAX_MEANING = 64

_ANATOMY = codes.SCT.AnatomicalStructure
_MORPHOLOGY = codes.SCT.MorphologicallyAbnormalStructure
_UNKNOWN = codes.SCT.SpatialAndRelationalConcept

TERMS: dict[str, Code] = {
    "adrenalgland": codes.SCT.AdrenalGland,
    "aorta": codes.SCT.Aorta,
    "bladder": codes.SCT.Bladder,
    "bone": codes.SCT.Bone,
    "brain": codes.SCT.Brain,
    "colon": codes.SCT.Colon,
    "duodenum": codes.SCT.Duodenum,
    "edema": codes.SCT.Edema,
    "esophagus": codes.SCT.Esophagus,
    "gallbladder": codes.SCT.Gallbladder,
    "heart": codes.SCT.Heart,
    "hippocampus": codes.SCT.Hippocampus,
    "inferiorvenacava": codes.SCT.InferiorVenaCava,
    "kidney": codes.SCT.Kidney,
    "lesion": codes.SCT.Lesion,
    "liver": codes.SCT.Liver,
    "lung": codes.SCT.Lung,
    "necrosis": codes.SCT.Necrosis,
    "neoplasm": codes.SCT.Neoplasm,
    "nodule": codes.SCT.Nodule,
    "pancreas": codes.SCT.Pancreas,
    "portalvein": codes.SCT.PortalVein,
    "prostate": codes.SCT.Prostate,
    "spleen": codes.SCT.Spleen,
    "stomach": codes.SCT.Stomach,
    "trachea": codes.SCT.Trachea,
}
_SAME = {
    "adrenal": "adrenalgland",
    "cancer": "neoplasm",
    "ivc": "inferiorvenacava",
    "livertumor": "neoplasm",
    "livertumour": "neoplasm",
    "oedema": "edema",
    "oesophagus": "esophagus",
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "urinarybladder": "bladder",
}
_MORPHOLOGIES = {"edema", "lesion", "necrosis", "neoplasm", "nodule"}


@dataclass(frozen=True, slots=True)
class Terms:
    """What a label is, in codes."""

    category: Code
    type: Code
    laterality: Code | None
    is_standard: bool
    """False for the fallback."""


def terms_of(name: str) -> Terms:
    """Coded terms of a label; see the module for those that have none."""
    words = re.sub(r"[^a-z0-9]+", " ", name.casefold()).split()
    sides = [side for side in ("left", "right") if side in words]
    key = "".join(word for word in words if word not in ("left", "right"))
    key = _SAME.get(key, key)
    if key in TERMS and len(sides) < 2:
        category = _MORPHOLOGY if key in _MORPHOLOGIES else _ANATOMY
        laterality = {"left": codes.SCT.Left, "right": codes.SCT.Right}.get("".join(sides))
        return Terms(category, TERMS[key], laterality, is_standard=True)
    meaning = name.strip()[:MAX_MEANING] or "unnamed"
    value = "L" + hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return Terms(_UNKNOWN, Code(value, PRIVATE_SCHEME, meaning), None, is_standard=False)
