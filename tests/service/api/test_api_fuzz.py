"""T-A1: whatever schemathesis makes of the OpenAPI document, nothing breaks (S5, T-H7).

In process, over ASGI, with a role that may do everything. Few uploads, since each starts a child
process; no `readyz`, which answers 503 here by right: no worker runs.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
LIMITED = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def schema(api, world):
    loaded = schemathesis.openapi.from_asgi("/api/v1/openapi.json", api.app)
    project = api("GET", "/projects/prj_default").json()
    yield loaded.exclude(operation_id="readyz")
    limits = {name: value for name, value in project.items() if name.startswith("max_")}
    assert limits
    assert api("PATCH", "/projects/prj_default", json=limits).status_code == 200  # for other files


@pytest.mark.timeout(400)  # on cores that others use too
@pytest.mark.parametrize("num_examples", [2, pytest.param(12, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_operation_breaks_or_answers_what_it_does_not_declare(api, schema, mode, num_examples):
    num_operations, statuses = 0, set()

    def probe(case):
        case.headers["Authorization"] = f"Bearer {api.tokens['admin']}"
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    for result in schema.get_all_operations():
        operation = result.ok()
        is_upload = operation.method == "post" and operation.path.endswith("/volumes")
        limited = settings(
            LIMITED, max_examples=min(4, num_examples) if is_upload else num_examples
        )
        try:
            limited(given(case=operation.as_strategy(generation_mode=mode))(probe))()
        except Unsatisfiable:  # an operation that takes nothing cannot be called wrongly
            assert mode is GenerationMode.NEGATIVE
        num_operations += 1

    assert num_operations > 25
    assert statuses >= ({200, 404} if mode is GenerationMode.POSITIVE else {422})


def test_the_fuzzer_would_see_a_defect(api, schema, monkeypatch):
    def fail(*_args, **_how):
        raise RuntimeError

    monkeypatch.setattr("service.registry.listing", fail)
    case = schema["/api/v1/models"]["GET"].Case()
    case.headers["Authorization"] = f"Bearer {api.tokens['admin']}"

    with pytest.raises(BaseException, match="Server error"):
        case.call_and_validate(checks=CHECKS)
