"""Where volumes lie, and that crops come out the same."""

import numpy as np
import pytest
import torch

from trainer.data import resident
from trainer.data.resident import Resident, fits

GIB = 1024**3


@pytest.mark.parametrize(
    ("needed", "free", "expected"),
    [
        (4 * GIB, 8 * GIB, True),
        (4 * GIB + 1, 8 * GIB, False),
        (1, 0, False),
        (900 * GIB, None, True),  # the host: they are there anyway
    ],
)
def test_volumes_go_onto_a_device_when_they_leave_half_of_it_free(
    needed: int, free: int | None, expected: bool
) -> None:
    assert fits(needed, free) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_volumes_in_host_memory_give_the_crops_of_resident_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    volume = np.random.default_rng(0).random((20, 18, 16)).astype(np.float16)
    near = Resident.of([volume], fill=[0], at_least=(8, 8, 8), device=cuda)
    monkeypatch.setattr(resident, "free_bytes", lambda _: 100)
    far = Resident.of([volume], fill=[0], at_least=(8, 8, 8), device=cuda)
    where = torch.tensor([0, 0]), torch.tensor([[1, 2, 3], [10, 9, 8]])

    crops = [volumes.crop(*where, (8, 8, 8)) for volumes in (near, far)]

    assert (near.flat.device.type, far.flat.device.type) == ("cuda", "cpu")
    assert all(crop.device.type == "cuda" for crop in crops)
    assert torch.equal(*crops)
    assert not torch.equal(crops[0][0], crops[0][1])
