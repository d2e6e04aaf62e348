"""Repositories of the hub, against a server on this machine that speaks the hub's protocol."""

import errno
import hashlib
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

import minidiff
from minidiff import CheckpointError
from minidiff.checkpoints import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = {
    "sample_size": 8,
    "block_out_channels": [32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}


class Hub(BaseHTTPRequestHandler):
    """me/tiny is there, me/gated lets nobody in, me/private those who have the token, me/down is down.

    me/broken sends half of each large file, me/flaky so only the first time; both go on where a request asks
    them to.
    """

    def log_message(self, *args):
        self.server.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".rstrip())

    def answer(self, status, body=b"", sent=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
            self.close_connection = sent is not None

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.answer_about("/".join(parts[2:4]), parts[4:])
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repository == "me/gated":
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        body = self.server.files.get(name)
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        breaks = repository == "me/broken" or (repository == "me/flaky" and not start)
        sent = len(body) // 2 if breaks and len(body) > 10_000 else None
        return self.answer(206 if start else 200, body[start:], sent, **headers)

    do_HEAD = do_GET

    def answer_about(self, repository, what):
        if repository == "me/down":
            return self.answer(503)
        private = repository == "me/private" and self.headers.get("Authorization") == "Bearer hf_secret"
        if not private and repository not in ("me/tiny", "me/gated", "me/broken", "me/flaky"):
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if what[:1] == ["revision"] and what[1] not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        files = self.server.files
        if what[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
        else:
            listed = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A repository of one small U-Net in three versions, {name: bytes}."""
    folder = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    model = minidiff.UNet2DModel(**UNET)
    model.save_pretrained(folder / "unet")
    model.half().save_pretrained(folder / "unet", variant="fp16")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.03}')
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old" * 1000)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The running hub: .asked lists the requests, .stop() ends it; huggingface_hub's cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked = files, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()

    server.stop = stop
    yield server
    if thread.is_alive():
        stop()


def fetched(server):
    """The files whose content was asked for."""
    return sorted(
        {
            a.partition(f"{COMMIT}/")[2].partition(" ")[0]
            for a in server.asked
            if a.startswith("GET") and "/resolve/" in a
        }
    )


def test_only_the_needed_files_are_fetched_and_only_once(server):
    model = minidiff.UNet2DModel.from_pretrained("me/tiny", "unet")
    assert fetched(server) == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    server.asked.clear()
    again = minidiff.UNet2DModel.from_pretrained("me/tiny", subfolder="unet")
    assert fetched(server) == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_variant_is_fetched_alone(server):
    model = minidiff.UNet2DModel.from_pretrained("me/tiny", "unet", variant="fp16", torch_dtype="auto")
    assert fetched(server) == ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert model.dtype == torch.float16


def test_configs_of_schedulers_and_pipelines_are_read(server):
    assert minidiff.DDPMScheduler.from_pretrained("me/tiny", subfolder="scheduler").config.beta_end == 0.03
    assert hub.read_json("me/tiny", "model_index.json") == {"_class_name": "DDPMPipeline"}
    assert hub.part_subfolder("me/tiny", "unet") == "unet"
    assert hub.part_subfolder("me/tiny", "vae") is None
    assert fetched(server) == ["model_index.json", "scheduler/scheduler_config.json"]


def test_a_given_cache_is_used(server, tmp_path):
    [path] = hub.resolve("me/tiny", lambda names, where: ["config.json"], "unet", cache_dir=tmp_path / "mine")
    assert path.is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()


def test_a_revision_is_asked_for(server):
    assert hub.read_json("me/tiny", "model_index.json", revision=COMMIT)
    with pytest.raises(CheckpointError, match="the repository has no revision 'v9'"):
        hub.read_json("me/tiny", "model_index.json", revision="v9")


@pytest.mark.parametrize(
    ("repository", "subfolder", "message"),
    [
        (
            "me/nothing",
            "unet",
            "me/nothing is not in the cache, and the hub has no such repository, or it is private",
        ),
        ("me/gated", "unet", "it is gated: accept its conditions .* pass token="),
        ("me/tiny", "vae", "me/tiny on the hub has no folder 'vae'"),
        ("me/tiny", "scheduler", r"me/tiny on the hub has no config\.json"),
        ("me/tiny", "../../etc", "not a name inside the checkpoint's folder"),
        ("me/a--b..c", "unet", "'me/a--b..c' is no repository id"),
        ("me", None, "there is no checkpoint 'me': it is no folder, no repository id"),
        ("me/tiny/unet", None, "there is no checkpoint 'me/tiny/unet'"),
        ("https://example.org/x", None, "there is no checkpoint 'https://example.org/x'"),
        ("", None, "there is no checkpoint ''"),
    ],
)
def test_what_can_not_be_had_is_an_error_that_says_why(server, repository, subfolder, message):
    with pytest.raises(CheckpointError, match=message):
        minidiff.UNet2DModel.from_pretrained(repository, subfolder)


def test_missing_weights_are_named_with_what_the_repository_has(server):
    with pytest.raises(
        CheckpointError, match=r"me/tiny on the hub has no .*\.bf16\.safetensors or .*; it has .*\.fp16\."
    ):
        minidiff.UNet2DModel.from_pretrained("me/tiny", "unet", variant="bf16")
    assert fetched(server) == []


def test_no_network_and_nothing_in_the_cache_says_both(server):
    server.stop()
    with pytest.raises(CheckpointError, match="me/tiny is not in the cache, and the hub can't be reached"):
        minidiff.UNet2DModel.from_pretrained("me/tiny", "unet")


def test_without_a_network_the_cache_is_used_and_says_so(server, caplog):
    minidiff.UNet2DModel.from_pretrained("me/tiny", "unet")
    server.stop()
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        minidiff.UNet2DModel.from_pretrained("me/tiny", "unet")
    assert "can't be reached" in caplog.text
    assert "using the copy in the cache" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"\(as cached; the hub can't be reached.* has no .*\.fp16\.safetensors"
    ):
        minidiff.UNet2DModel.from_pretrained("me/tiny", "unet", variant="fp16")
    with pytest.raises(CheckpointError, match=r"\(as cached; .* has no folder 'scheduler'"):
        minidiff.DDPMScheduler.from_pretrained("me/tiny", subfolder="scheduler")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_nobody_is_asked(server, monkeypatch, caplog, how):
    minidiff.UNet2DModel.from_pretrained("me/tiny", "unet")
    server.asked.clear()
    if how == "environment":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options = {"local_files_only": True} if how == "argument" else {}
    minidiff.UNet2DModel.from_pretrained("me/tiny", "unet", **options)
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match=r"me/other is not in the cache, and .* forbids to ask the hub"):
        minidiff.UNet2DModel.from_pretrained("me/other", "unet", **options)
    assert server.asked == []


def test_a_hub_that_is_down_gives_its_status(server):
    with pytest.raises(
        CheckpointError, match="me/down is not in the cache, and the hub answered with HTTP status 503"
    ):
        minidiff.UNet2DModel.from_pretrained("me/down", "unet")


def test_a_cache_that_can_not_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the cache can't be written: "):
        hub.read_json("me/tiny", "model_index.json", cache_dir=tmp_path / "file")


def test_a_full_disk_is_named():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert (
        hub._explain(error, "me/tiny", None) == "the disk of the cache is full; make room, or pass cache_dir="
    )


@pytest.mark.slow  # huggingface_hub tries again, with pauses
def test_a_connection_that_breaks_leaves_no_half_file(server, tmp_path):
    with pytest.raises(CheckpointError, match="can't be reached"):
        minidiff.UNet2DModel.from_pretrained("me/broken", "unet")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_broken_connection_goes_on_where_it_broke(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what is kept of a broken connection
    model = minidiff.UNet2DModel.from_pretrained("me/flaky", "unet")
    assert any(a.endswith("diffusion_pytorch_model.safetensors bytes=300000-") for a in server.asked)
    whole = minidiff.UNet2DModel.from_pretrained("me/tiny", "unet").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_a_private_repository_opens_with_its_token_alone(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(CheckpointError, match=r"no such repository, or it is private: .* pass token="):
        minidiff.UNet2DModel.from_pretrained("me/private", "unet", token="hf_wrong")
    model = minidiff.UNet2DModel.from_pretrained("me/private", "unet", token="hf_secret")
    assert model.config.sample_size == 8


# --- names of folders and of what ships ---


def test_a_built_in_name_wins_over_a_folder_and_a_path_means_the_folder(tmp_path, monkeypatch):
    for place in (tmp_path / "ships", tmp_path / "here"):
        (place / "scenes").mkdir(parents=True)
        (place / "scenes" / "x.json").write_text(json.dumps({"from": place.name}))
    monkeypatch.setattr(hub, "BUILT_IN", tmp_path / "ships")
    monkeypatch.chdir(tmp_path / "here")
    assert hub.read_json("scenes", "x.json") == {"from": "ships"}
    assert hub.read_json("./scenes", "x.json") == {"from": "here"}
    assert hub.read_json(tmp_path / "here" / "scenes", "x.json") == {"from": "here"}


def test_a_built_in_checkpoint_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUILT_IN", tmp_path)
    with pytest.raises(CheckpointError, match="'scenes-ddpm' is not part of this installation of minidiff"):
        hub.read_json("scenes-ddpm", "model_index.json")


def test_a_folder_named_like_a_repository_is_the_folder(tmp_path, monkeypatch):
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    (tmp_path / "me" / "tiny" / "x.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.read_json("me/tiny", "x.json") == {}


def test_the_parts_of_early_ddpm_repositories_lie_in_the_root(tmp_path):
    torch.manual_seed(0)
    minidiff.UNet2DModel(**UNET).save_pretrained(tmp_path)
    assert hub.part_subfolder(tmp_path, "unet") is None
    assert minidiff.UNet2DModel.from_pretrained(tmp_path, hub.part_subfolder(tmp_path, "unet"))


def test_a_file_in_place_of_a_folder_says_what_to_give(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder that holds"):
        minidiff.UNet2DModel.from_pretrained(tmp_path / "model.safetensors")


def test_a_name_of_another_type_is_a_type_error():
    with pytest.raises(TypeError, match="a checkpoint is named by a str or a path, not int"):
        minidiff.UNet2DModel.from_pretrained(3)
