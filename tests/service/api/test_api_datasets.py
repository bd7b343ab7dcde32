"""Datasets: what fits together is kept, what does not is refused whole."""

import pytest

HEX = "0" * 32


def test_a_dataset_lists_its_items_and_their_splits(api, world):
    body = {
        "name": "Both",
        "items": [{"volume_id": world.image, "labels_id": world.labels, "split": "val"}],
    }

    made = api("POST", "/datasets", json=body)

    assert made.status_code == 201
    item = {"volume_id": world.image, "labels_id": world.labels, "subject": "subject-1"}
    item["classes"] = None
    assert made.json()["items"] == [{**item, "split": "val"}]
    again = api("GET", made.headers["location"].removeprefix("/api/v1"))
    assert again.json() == made.json()


@pytest.mark.parametrize(
    ("items", "status", "code"),
    [
        ([{"volume_id": "image", "labels_id": "other_labels"}], 422, "label_shape_mismatch"),
        ([{"volume_id": "labels"}], 422, "wrong_volume_kind"),
        ([{"volume_id": "image", "labels_id": "zipped"}], 422, "wrong_volume_kind"),
        (
            [
                {"volume_id": "image", "split": "train"},
                {"volume_id": "zipped", "split": "test"},
            ],
            422,
            "split_leaks_subject",
        ),
        ([{"volume_id": f"vol_{HEX}"}], 404, "not_found"),
        ([{"volume_id": "image"}, {"volume_id": "image"}], 422, "invalid_request"),
        ([], 422, "invalid_request"),
        ([{"volume_id": "image", "split": "holiday"}], 422, "invalid_request"),
    ],
)
def test_a_bad_dataset_is_refused_whole(api, world, items, status, code):
    named = [{key: getattr(world, value, value) for key, value in item.items()} for item in items]
    before = api.counts()

    response = api("POST", "/datasets", json={"name": "Bad", "items": named})

    assert (response.status_code, response.json()["code"]) == (status, code)
    assert api.counts() == before


def test_a_shape_mismatch_says_what_was_found_and_what_was_expected(api, world):
    items = [{"volume_id": world.image, "labels_id": world.other_labels}]

    body = api("POST", "/datasets", json={"name": "Bad", "items": items}).json()

    assert (body["found"], body["expected"]) == ([32, 32, 12], [32, 32, 16])


def test_a_dataset_in_use_stays_and_one_that_is_not_goes(api, world):
    body = {"name": "Used", "items": [{"volume_id": world.image}]}
    used = api("POST", "/datasets", json=body).json()["id"]
    unused = api("POST", "/datasets", json=body).json()["id"]
    run = {"kind": "pretrain", "dataset_id": used, "model_name": "uses", "recipe": {}}
    assert api("POST", "/runs", json=run).status_code == 202

    kept = api("DELETE", f"/datasets/{used}")
    gone = api("DELETE", f"/datasets/{unused}")

    assert (kept.status_code, kept.json()["code"]) == (409, "dataset_in_use")
    assert gone.status_code == 204
    assert api("GET", f"/datasets/{used}").status_code == 200
    assert api("GET", f"/datasets/{unused}").status_code == 404
    assert api("GET", f"/volumes/{world.image}").status_code == 200


def test_pages_follow_each_other_without_gaps_or_repeats(api, world):
    body = {"name": "Paged", "items": [{"volume_id": world.image}]}
    made = [api("POST", "/datasets", json=body).json()["id"] for _ in range(5)]

    seen, token = [], None
    while True:
        query = "?page_size=2" + (f"&page_token={token}" if token else "")
        page = api("GET", f"/datasets{query}").json()
        assert len(page["items"]) <= 2
        seen += [item["id"] for item in page["items"]]
        if token is None:  # what appears while someone pages moves nothing
            api("POST", "/datasets", json=body)
        token = page["next_page_token"]
        if token is None:
            break

    assert [dataset for dataset in seen if dataset in made] == made[::-1]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("token", ["", "!", "e30", "WzEsMl0", "WyJhIiwiYiJd", "bnVsbA", "x" * 300])
def test_a_token_that_is_not_ours_is_refused(api, token):
    response = api("GET", f"/datasets?page_token={token}")

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["pointer"] == "/query/page_token"
