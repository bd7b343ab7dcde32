"""A scan through a segmenter as every run does it: planned for the memory there is, then done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from imaging.volume import Volume
from models import cascade, memory, preflight
from models.blend import Progress
from models.cascade import Case
from models.flips import Axis
from models.preflight import Preflight
from service import resident
from service.resident import Held
from service.settings import Settings
from service.storage import Store

MAP_BYTES = 3
"""A voxel of the scan: the map of the entropy at both spacings, and its way to the file."""


def segment(
    settings: Settings,
    store: Store,
    held: Held,
    scan: Volume,
    *,
    flips: Sequence[Axis] = (),
    wants_map: bool = False,
    on_plan: Callable[[Preflight], None] | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Preflight, Case]:
    """Plan a segmentation, and do it.

    Args:
        settings: How much memory it may take.
        store: Where the bundle lies.
        held: The model, loaded.
        scan: In RAS+.
        flips: Axes of mirror images.
        wants_map: Keep a map of the entropy.
        on_plan: Told of the plan before it is followed.
        progress: See `models.cascade.segment_case`.
        should_stop: The same.

    Raises:
        BundleError: `insufficient_memory`, or what the network raises.
        Stopped: `should_stop` turned true.
    """
    coarse = resident.coarse_of(settings, store, held)
    left = memory.available_bytes(settings.inference_memory_bytes)
    if left is not None and wants_map:
        left = max(left - MAP_BYTES * scan.voxels.size, 0)
    plan = preflight.plan(
        held.session, scan, available_bytes=left, num_views=2 ** len(flips), coarse=coarse
    )
    if on_plan is not None:
        on_plan(plan)
    case = cascade.segment_case(
        held.session,
        scan,
        coarse=coarse,
        flips=flips,
        wants_map=wants_map,
        plan=plan,
        progress=progress,
        should_stop=should_stop,
    )
    return plan, case
