"""The client, over a socket, against a real server."""

import threading
import time
import zipfile
from collections.abc import Iterator

import pytest

from service.client import ApiError, Client

NET = {"network": {"base_width": 8}}


@pytest.fixture
def client(api, url) -> Iterator[Client]:
    with Client(url, api.tokens["admin"]) as client:
        yield client


def test_an_upload_tells_how_much_was_sent(client, scans, tmp_path):
    path = tmp_path / "scan.zip"
    path.write_bytes(scans.zipped)
    sent: list[int] = []

    volume = client.upload(path, subject="by-client", on_progress=sent.append)
    client.download_volume(volume.id, tmp_path / "back.zip", format="original")

    assert (volume.subject, volume.modality) == ("by-client", "CT")
    assert sent[-1] == len(scans.zipped)
    assert (tmp_path / "back.zip").stat().st_size == volume.size_bytes
    assert client.volume(volume.id) == volume
    assert volume in client.volumes(subject="by-client")


def test_a_refusal_is_an_error_with_status_code_and_detail(client, tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("not a scan" * 1000)

    with pytest.raises(ApiError) as caught:
        client.upload(path)

    assert (caught.value.status, caught.value.code) == (422, "not_a_scan")
    assert caught.value.detail


def test_a_wrong_field_is_named_in_the_detail(client, world):
    with pytest.raises(ApiError, match="/body/recipe/learning_rat: unknown field"):
        client.pretrain(world.unlabelled, {"learning_rat": 1}, model_name="m")


def test_a_service_that_does_not_answer_is_unreachable(api):
    with (
        Client("http://127.0.0.1:9", api.tokens["admin"]) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.capabilities()

    assert (caught.value.status, caught.value.code) == (0, "unreachable")


def test_a_run_is_followed_to_its_end(api, client, world):
    dataset = client.create_dataset("Through the client", [(world.image, world.labels, "train")])
    run = client.finetune(
        dataset.id, {"labels": {"liver": 1}, **NET}, model_name="client-made", parent="encoder"
    )
    told: list[str] = []
    worker = threading.Timer(0.5, api.work, args=[run.id])
    worker.start()

    ended = client.wait(run.id, lambda event: told.append(event.type), timeout_s=30)
    worker.join()

    assert (run.state, ended.state) == ("queued", "succeeded")
    assert told == ["state", "state", "state", "progress", "metric", "metric", "state"]
    assert [point.value for point in client.metrics(run.id).points] == [2.5, 1.5]
    assert client.dataset(dataset.id) == dataset


def test_where_streams_do_not_get_through_the_client_asks_and_tells_the_same(
    api, client, world, monkeypatch
):
    run = client.pretrain(world.unlabelled, NET, model_name="polled")
    api.work(run.id)
    streamed: list[int] = []
    client.wait(run.id, lambda event: streamed.append(event.id))
    listed: list[int] = []

    def broken(*_args):
        raise ApiError(0, "unreachable", "a proxy held the stream back")

    monkeypatch.setattr(client, "_stream", broken)
    monkeypatch.setattr("service.client.runs.POLL_S", 0.01)
    client.wait(run.id, lambda event: listed.append(event.id), timeout_s=30)

    assert listed == streamed
    assert len(streamed) == 7


def test_a_stream_that_breaks_is_taken_up_where_it_broke(api, client, world, monkeypatch):
    run = client.pretrain(world.unlabelled, NET, model_name="broken-off")
    api.work(run.id)
    whole: list[int] = []
    client.wait(run.id, lambda event: whole.append(event.id))
    stream, told = client._stream, []

    def short(run_id, after, deadline):
        for number, event in enumerate(stream(run_id, after, deadline)):
            if number == 2:
                raise ApiError(0, "unreachable", "cut")
            yield event

    monkeypatch.setattr(client, "_stream", short)
    client.wait(run.id, lambda event: told.append(event.id), timeout_s=30)

    assert told == whole


def test_waiting_ends_when_the_time_is_up(client, world):
    run = client.pretrain(world.unlabelled, NET, model_name="endless")

    with pytest.raises(ApiError, match="timeout"):
        client.wait(run.id, timeout_s=0.5)

    assert client.cancel(run.id).state == "canceled"


def test_a_move_outlasts_the_clients_own_patience(api, url, world, monkeypatch):
    def slow(*_args):
        time.sleep(0.6)

    monkeypatch.setattr("service.warming.before_move", slow)
    with Client(url, api.tokens["admin"], timeout_s=0.3) as hasty:
        moved = hasty.set_alias("encoder", "slow", 1)
        hasty.delete_alias("encoder", "slow")

    assert moved.version == 1


def test_models_aliases_and_bundles(client, world, tmp_path):
    assert "encoder" in {model.name for model in client.models()}

    alias = client.set_alias("encoder", "by-client", 1)
    with pytest.raises(ApiError) as caught:
        client.set_alias("encoder", "by-client", 1, revision=alias.revision + 1)
    client.download_bundle("encoder", 1, tmp_path / "encoder.zip")

    assert caught.value.code == "precondition_failed"
    assert alias in client.model("encoder").aliases
    assert client.model_version("encoder", 1).manifest["kind"] == "encoder"
    with zipfile.ZipFile(tmp_path / "encoder.zip") as archive:
        assert "encoder-1/manifest.json" in archive.namelist()
    client.delete_alias("encoder", "by-client")


def test_a_download_that_is_refused_leaves_no_file(client, world, tmp_path):
    made = client.segment(world.image, "segmenter", wait=False)

    with pytest.raises(ApiError) as caught:
        client.download_mask(made.id, tmp_path / "mask.nii.gz")

    assert caught.value.code == "not_ready"
    assert list(tmp_path.iterdir()) == []
    assert client.cancel(made.id).state == "canceled"


def test_a_segmentation_is_waited_for(api, client, world):
    result = {"volumes_ml": {"liver": 1.0}, "voxels": {"liver": 2}, "timings_s": {}}
    done = threading.Event()
    others = {run.id for run in client.runs(kind="segment", state="queued")}

    def work() -> None:
        while not done.is_set():
            for run in client.runs(kind="segment", state="queued"):
                if run.id not in others:
                    api.work(run.id, result=result)
                    return
            time.sleep(0.05)

    worker = threading.Thread(target=work)
    worker.start()
    made = client.segment(world.image, "segmenter")
    done.set()
    worker.join()

    assert made.state == "succeeded"
    assert made.result is not None
    assert made.result.volumes_ml == {"liver": 1.0}
