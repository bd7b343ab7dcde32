"""Datasets: labels lie on their image, and no subject is in two splits."""

from collections import Counter

import numpy as np
import pytest

from service import datasets, runs
from service.datasets import Item, Split
from service.db import Blob, Volume, new_id
from service.errors import ServiceError

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0]).tolist()


@pytest.fixture
def session(sessions):
    with sessions() as session:
        session.add(Blob(sha256="0" * 64, size_bytes=1))
        session.commit()
        yield session


def add(session, *, kind="image", subject="s", shape=(8, 8, 4), affine=AFFINE):
    volume = Volume(
        id=new_id("vol"),
        kind=kind,
        subject=subject,
        modality="CT",
        format="nifti",
        original_sha256="0" * 64,
        series_selector=new_id("x")[:60],
        voxels_sha256="0" * 64,
        shape=list(shape),
        spacing_mm=[2.0, 2.0, 3.0],
        affine=affine,
        source_shape=list(shape),
        source_affine=affine,
        intake={},
        created_by="t",
    )
    session.add(volume)
    session.commit()
    return volume.id


def create(session, items, **more):
    dataset = datasets.create(session, name="d", items=items, principal="t", **more)
    session.commit()
    return dataset


def code_of(session, items):
    with pytest.raises(ServiceError) as refused:
        create(session, items)
    session.rollback()
    return refused.value.code, refused.value.extra


def test_a_dataset_keeps_its_items_in_order_with_a_split_each(session):
    ids = [add(session, subject=f"s{number}") for number in range(10)]

    dataset = create(session, [Item(volume_id) for volume_id in ids])

    items = datasets.items_of(session, dataset.id)
    assert [item.volume_id for item in items] == ids
    assert Counter(item.split for item in items) == {"train": 7, "val": 1, "test": 2}


def test_the_same_content_has_the_same_digest(session):
    ids = [add(session, subject=f"s{number}") for number in range(4)]
    items = [Item(volume_id) for volume_id in ids]

    digests = [create(session, items).digest for _ in range(2)]
    other = create(session, items, split=Split(train=1.0, val=0.0, test=0.0)).digest

    assert digests[0] == digests[1] != other


def test_labels_of_another_shape_are_refused_with_both_shapes(session):
    image = add(session)
    labels = add(session, kind="labels", shape=(8, 8, 5))

    code, extra = code_of(session, [Item(image, labels)])

    assert code == "label_shape_mismatch"
    assert extra == {"found": [8, 8, 5], "expected": [8, 8, 4]}


def test_labels_on_another_grid_are_refused(session):
    image = add(session)
    shifted = np.array(AFFINE)
    shifted[0, 3] = 0.5
    labels = add(session, kind="labels", affine=shifted.tolist())

    code, extra = code_of(session, [Item(image, labels)])

    assert code == "label_geometry_mismatch"
    assert extra["expected"] == AFFINE


def test_a_difference_of_rounding_is_no_other_grid(session):
    image = add(session)
    rounded = np.array(AFFINE)
    rounded[0, 0] += 1e-5
    labels = add(session, kind="labels", affine=rounded.tolist())

    assert create(session, [Item(image, labels)]).id


def test_the_kinds_of_volumes_are_checked(session):
    image, labels = add(session), add(session, kind="labels")

    assert code_of(session, [Item(labels)])[0] == "wrong_volume_kind"
    assert code_of(session, [Item(image, image)])[0] == "wrong_volume_kind"
    assert code_of(session, [Item("vol_none")])[0] == "not_found"
    assert code_of(session, [])[0] == "invalid_request"
    assert code_of(session, [Item(image), Item(image)])[0] == "invalid_request"


def test_a_subject_asked_into_two_splits_is_refused(session):
    one, two = add(session, subject="same"), add(session, subject="same")

    code, extra = code_of(session, [Item(one, split="train"), Item(two, split="test")])

    assert code == "split_leaks_subject"
    assert "same" not in str(extra)


def test_a_subject_follows_the_split_of_its_other_scan(session):
    one, two = add(session, subject="same"), add(session, subject="same")

    dataset = create(session, [Item(one, split="test"), Item(two)])

    assert [item.split for item in datasets.items_of(session, dataset.id)] == ["test", "test"]


def test_a_dataset_in_use_is_not_deleted(session):
    dataset = create(session, [Item(add(session))])
    free = create(session, [Item(add(session))])
    runs.create(session, kind="pretrain", spec={}, dataset_id=dataset.id, principal="t")
    session.commit()

    with pytest.raises(ServiceError) as refused:
        datasets.delete(session, dataset.id)
    datasets.delete(session, free.id)
    session.commit()

    assert refused.value.code == "dataset_in_use"
    with pytest.raises(ServiceError, match="not_found"):
        datasets.get(session, free.id)
