"""`everanimate models` on a Hub that a local server plays, and other layouts in `animate`."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, Hub, use_hub
from original import build_original_networks, name_transformer, write_diffusers, write_original
from safetensors.torch import save_file
from studio import Animate, Program

from everanimate_cli import cached_models, hub
from everanimate_cli.model_table import DETECTORS, ModelFile
from everanimate_cli.settings import HUB_MODEL, HUB_PRESET

LORA = "owner/lora/ckpts/a.safetensors"
FAST = "owner/fast/b.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(program: Program) -> Program:
    """Runs `everanimate models`."""
    return partial(program, "models")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(
    hub_server: tuple[str, list[Hub]],
    cache: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Hub:
    """A Hub with a model and a LoRA, and an empty cache."""
    address, current = hub_server
    current[:] = [Hub()]
    use_hub(address, cache, monkeypatch)
    current[0].add("owner/tiny", tiny_model)
    current[0].repositories["owner/tiny"]["README.md"] = b"not needed"
    current[0].repositories["owner/lora"] = {"ckpts/a.safetensors": bytes(5000), "b.bin": b"b"}
    monkeypatch.setattr(cached_models, "KNOWN_NAMES", ("toy", "owner/tiny", LORA, FAST))
    for module in (cached_models, hub):
        monkeypatch.setattr(module, "DEFAULT_NAMES", ("owner/tiny", LORA))
        monkeypatch.setattr(module, "FAST_NAMES", (FAST,))
    return current[0]


def blob_of(cache: Path, file: str) -> Path:
    return next(cache.rglob(f"snapshots/{COMMIT}/{file}")).resolve()


def test_pull_list_path_and_verify(server: Hub, cache: Path, models: Program) -> None:
    listed = models("list")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.splitlines()[1:] == [
        "model owner/tiny: not in the cache, used by default",
        f"lora {LORA}: not in the cache, used by default",
        f"lora {FAST}: not in the cache, used by animate --fast",
    ]
    assert server.num_requests == 0

    planned = models("pull", "--dry-run", "--json")
    plan = json.loads(planned.out)
    size = sum(map(len, server.repositories["owner/tiny"].values())) - len(b"not needed")
    assert [(step["name"], step["missing_bytes"]) for step in plan] == [
        ("owner/tiny", size),
        (LORA, 5000),
    ]
    assert not cache.exists()
    assert "owner/tiny: " in models("pull", "--dry-run").out

    pulled = models("pull")
    assert pulled.code == 0
    folder = cache / "models--owner--tiny" / "snapshots" / COMMIT
    lora = cache / "models--owner--lora" / "snapshots" / COMMIT / "ckpts" / "a.safetensors"
    assert pulled.out == f"{folder}\n{lora}\n"
    assert pulled.err.startswith(f"downloading owner/tiny: {size / 1e6:.1f} MB, to {cache}\n")
    num_mb = round(size / 1e6)
    assert f"downloading owner/tiny: {num_mb}/{num_mb} MB, " in pulled.err
    assert not (folder / "README.md").exists()
    assert not lora.with_name("b.bin").exists()

    num_requests = server.num_requests
    assert models("path", "owner/tiny").out == f"{folder}\n"
    assert models("path", f"{LORA}@{COMMIT}").out == f"{lora}\n"
    (listed_tiny,) = json.loads(models("list", "owner/tiny", "--json").out)
    assert listed_tiny == {
        "name": "owner/tiny",
        "kind": "model",
        "state": "complete",
        "num_bytes": size,
        "revision": COMMIT,
        "path": str(folder),
        "use": "default",
    }
    assert models("list").out.splitlines()[2] == (
        f"lora {LORA}: in the cache, 0.0 MB, revision {COMMIT}, used by default"
    )
    again = models("pull", "--json", "--quiet")
    assert again.err == ""
    assert [model["state"] for model in json.loads(again.out)] == ["complete", "complete"]
    assert server.num_requests == num_requests


def test_pull_tells_of_the_fast_lora_and_takes_it_on_request(
    server: Hub, cache: Path, models: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["owner/fast"] = {"b.safetensors": bytes(7000)}
    known = hub.KnownLora(rank=1, has_image_layers=False)
    monkeypatch.setitem(hub._KNOWN_LORAS, FAST, known)
    line = "animate --fast needs another LoRA (about 10 MB): everanimate models pull --fast"
    assert models("pull").err.splitlines()[-1] == line
    assert models("pull", "owner/tiny").err.count("--fast") == 0
    assert models("list", FAST).out == (
        f"lora {FAST}: not in the cache, about 10 MB in all, used by animate --fast\n"
    )
    pulled = models("pull", "--fast")
    assert pulled.code == 0
    path = cache / "models--owner--fast" / "snapshots" / COMMIT / "b.safetensors"
    assert pulled.out.splitlines()[-1] == str(path)
    assert len(pulled.out.splitlines()) == 3
    assert line not in pulled.err
    assert line not in models("pull").err
    # Beside a NAME it is one more.
    assert models("pull", "toy", "--fast").out.splitlines() == [str(hub.TOY_FOLDER), str(path)]
    assert json.loads(models("list", FAST, "--json").out)[0]["use"] == "fast"


def test_pull_brings_again_what_is_cut_short(server: Hub, cache: Path, models: Program) -> None:
    """A disk that was full, or a copy that stopped, may leave such files."""
    assert models("pull", "owner/tiny").code == 0
    blob = blob_of(cache, VAE_FILE)
    content = blob.read_bytes()
    blob.write_bytes(content[:-10])
    bad = models("verify", "owner/tiny")
    assert bad.code == 1
    assert bad.out == (
        f"owner/tiny: only partly in the cache, where {VAE_FILE} is cut short. "
        "Run everanimate models pull owner/tiny.\n"
    )
    assert models("path", "owner/tiny").code == 2
    assert models("list", "owner/tiny").out.startswith("model owner/tiny: partly in the cache, ")
    server.requests.clear()
    pulled = models("pull", "owner/tiny")
    assert (pulled.code, pulled.out) == (0, models("path", "owner/tiny").out)
    assert server.sent_ranges() == [""]  # this file alone
    assert blob.read_bytes() == content
    assert models("verify", "owner/tiny").code == 0


def test_an_address_that_is_none_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    """The Hub's library would stumble while it is imported, with a trace."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:99999", "HOME": str(tmp_path)}
    line = "error: HF_ENDPOINT http://127.0.0.1:99999 is no address (Port out of range 0-65535). "
    for words, code in ((["models", "list"], 2), (["doctor"], 2), (["models", "--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-m", "everanimate_cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert done.stderr.startswith(line) == (code == 2)
        assert done.stderr.count("\n") == code // 2


def test_verify_finds_what_is_damaged(server: Hub, cache: Path, models: Program) -> None:
    assert models("pull", "owner/tiny").code == 0
    num_requests = server.num_requests
    num_files = len(server.repositories["owner/tiny"]) - 1
    good = models("verify", "owner/tiny")
    assert (good.code, good.out) == (
        0,
        f"owner/tiny: {num_files} files have the stated hashes, "
        "names and shapes of all weights are right\n",
    )
    for name in (VAE_FILE, "tokenizer/tokenizer.json"):  # hashes of LFS, and of git
        blob = blob_of(cache, name)
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        bad = models("verify", "owner/tiny", "--json", "--quiet")
        assert (bad.code, bad.err) == (1, "")
        (verdict,) = json.loads(bad.out)
        assert not verdict["is_right"]
        assert verdict["num_hashed"] == num_files
        assert verdict["problems"][0].startswith(f"{name} is damaged: its hash is ")
        assert verdict["problems"][0].endswith(
            f"Delete {blob} and run everanimate models pull owner/tiny"
        )
        blob.unlink()
        assert models("pull", "owner/tiny").code == 0
        assert models("verify", "owner/tiny").code == 0
    # All this but the downloads went without the network.
    assert not any(
        "resolve" in r.path and r.method == "GET"
        for r in server.requests[:num_requests]
        if VAE_FILE in r.path
    )


def test_verify_without_links_asks_the_hub(server: Hub, cache: Path, models: Program) -> None:
    """As on Windows, where the cache holds files under their own names."""
    assert models("pull", "owner/tiny").code == 0
    for link in (cache / "models--owner--tiny" / "snapshots" / COMMIT).rglob("*"):
        if link.is_symlink():
            content = link.read_bytes()
            link.unlink()
            link.write_bytes(content)
    num_requests = server.num_requests
    assert models("verify", "owner/tiny").code == 0
    assert server.num_requests == num_requests + 1
    # Of the commit that is here: the branch may have moved on.
    assert server.requests[-1].path.startswith(f"/api/models/owner/tiny/revision/{COMMIT}")
    path = cache / "models--owner--tiny" / "snapshots" / COMMIT / VAE_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    bad = models("verify", "owner/tiny")
    assert bad.code == 1
    assert f"{VAE_FILE} is damaged" in bad.out


def test_verify_looks_into_the_headers(server: Hub, models: Program) -> None:
    """A repository can be whole and yet hold another network."""
    server.repositories["owner/tiny"][VAE_FILE] = server.repositories["owner/tiny"][
        "text_encoder/model.safetensors"
    ]
    assert models("pull", "owner/tiny", LORA).code == 0
    bad = models("verify", "owner/tiny", LORA)
    assert bad.code == 1
    first, second = bad.out.splitlines()
    assert "the weights in vae are not those of its config.json" in first
    assert f"{LORA}: " in second
    assert "is not a safetensors file" in second


def test_what_is_partly_there(server: Hub, cache: Path, models: Program) -> None:
    assert models("pull", "owner/tiny").code == 0
    (cache / "models--owner--tiny" / "snapshots" / COMMIT / VAE_FILE).unlink()
    (listed,) = json.loads(models("list", "owner/tiny", "--json").out)
    assert listed["state"] == "partial"
    refused = models("path", "owner/tiny")
    assert (refused.code, refused.out, refused.err) == (
        2,
        "",
        f"error: owner/tiny is partly in the cache ({cache}). "
        "Run everanimate models pull owner/tiny.\n",
    )
    bad = models("verify", "owner/tiny")
    assert bad.code == 1
    assert bad.out == (
        "owner/tiny: only partly in the cache. Run everanimate models pull owner/tiny.\n"
    )
    server.requests.clear()
    assert models("pull", "owner/tiny").code == 0  # its content is still in the cache
    assert server.sent_ranges() == []
    assert models("verify", "owner/tiny").code == 0


def test_all_but_the_transformer(server: Hub, cache: Path, models: Program) -> None:
    assert server.repositories
    assert models("pull", "owner/tiny", "--no-transformer").code == 0
    assert not list(cache.rglob("snapshots/*/transformer/*.safetensors"))
    again = models("pull", "owner/tiny", "--no-transformer", "--dry-run")
    assert again.out.startswith("owner/tiny: 0 files, 0.0 MB missing of ")
    (listed,) = json.loads(models("list", "owner/tiny", "--json").out)
    assert listed["state"] == "partial"


def test_pose_models(
    server: Hub, tmp_path: Path, models: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"a pose model" * 100
    server.repositories["owner/pose"] = {"net.onnx": content}
    address = huggingface_hub.constants.ENDPOINT
    file = ModelFile(
        name="net.onnx",
        urls=(f"{address}/owner/pose/resolve/main/net.onnx",),
        num_mb=1,
        sha256=sha256(content).hexdigest(),
    )
    detector = replace(DETECTORS["yolox-m"], files=(file,))
    monkeypatch.setattr(cached_models, "DETECTORS", {"yolox-m": detector})
    monkeypatch.setenv("EVERANIMATE_CACHE", str(tmp_path / "pose"))
    path = tmp_path / "pose" / "net.onnx"
    assert (
        models("list", "yolox-m").out == "detector yolox-m: not in the cache, about 1 MB in all\n"
    )
    assert models("path", "yolox-m").err == (
        f"error: yolox-m is not in the cache ({tmp_path / 'pose'}). "
        "Run everanimate models pull yolox-m.\n"
    )
    assert models("pull", "yolox-m", "--dry-run").out == (
        "yolox-m: 1 file, 1.0 MB missing of 1.0 MB\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        refused = models("pull", "yolox-m")
        assert (refused.code, refused.out) == (2, "")
        assert refused.err == (
            f"error: yolox-m is not in the cache ({tmp_path / 'pose'}) and HF_HUB_OFFLINE is set. "
            "Unset it to download it (about 1 MB), or copy the cache of a machine that has it.\n"
        )
    pulled = models("pull", "yolox-m")
    assert (pulled.code, pulled.out) == (0, f"{path}\n")
    assert path.read_bytes() == content
    assert models("path", "yolox-m").out == f"{path}\n"
    assert models("verify", "yolox-m").out == "yolox-m: 1 file has the stated hashes\n"
    path.write_bytes(b"another")
    bad = models("verify", "yolox-m")
    assert bad.code == 1
    assert f"{path} is damaged or another file" in bad.out


def test_the_defaults_are_what_animate_takes() -> None:
    assert (
        HUB_MODEL,
        hub.RELEASED_LORAS[1],
        "rtmw",
        "yolox-m",
    ) == hub.DEFAULT_NAMES
    assert tuple(spec.source for spec in HUB_PRESET.fast_lora) == hub.FAST_NAMES
    step_distilled = {spec.source for spec in HUB_PRESET.fast_lora}  # what --fast needs besides
    assert {"toy", HUB_MODEL, *hub.RELEASED_LORAS, *step_distilled, "rtmw", "yolox-m"} <= set(
        cached_models.KNOWN_NAMES
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["pull", "owner/wrong"],
            "owner/wrong is not on {hub}, or is private. Check the name, or log in with "
            "'hf auth login'.",
        ),
        (
            ["pull", "owner/tiny@v9"],
            "owner/tiny@v9 has no revision v9. Give a branch, a tag or a commit after '@'.",
        ),
        (
            ["pull", "owner/lora/c.safetensors"],
            f"owner/lora/c.safetensors has no c.safetensors. Known: {LORA}.",
        ),
        (
            ["pull", "owner/lora/b.bin"],
            "owner/lora/b.bin is not a .safetensors file. Give the Hub id of a LoRA.",
        ),
        (
            ["verify", "owner/tiny"],
            "owner/tiny is not in the cache ({cache}). Run everanimate models pull owner/tiny.",
        ),
        (
            ["path", "nothing"],
            f"nothing is unknown. Give a Hub id such as {HUB_MODEL}, or of a LoRA such as "
            f"{hub.RELEASED_LORAS[1]}, or a name that models list shows.",
        ),
        (
            ["path", "owner/lora/../../a.safetensors"],
            f"owner/lora/../../a.safetensors is unknown. Give a Hub id such as {HUB_MODEL}, or of "
            f"a LoRA such as {hub.RELEASED_LORAS[1]}, or a name that models list shows.",
        ),
        (
            ["list", ""],
            f"NAME is unknown. Give a Hub id such as {HUB_MODEL}, or of a LoRA such as "
            f"{hub.RELEASED_LORAS[1]}, or a name that models list shows.",
        ),
        (["path"], "Missing argument 'NAME'. See 'everanimate models path --help'."),
    ],
)
def test_slips(server: Hub, cache: Path, models: Program, words: list[str], error: str) -> None:
    assert server.repositories
    result = models(*words)
    address = huggingface_hub.constants.ENDPOINT
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {error.format(hub=address, cache=cache)}\n"
    assert not cache.exists()


@pytest.mark.parametrize("command", ["list", "path", "pull", "verify"])
def test_a_folder_without_a_checkpoint(models: Program, tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    result = models(command, str(tmp_path))
    assert (result.code, result.out, result.err) == (
        2,
        "",
        f"error: {tmp_path} is a folder without a checkpoint: it has no transformer/config.json. "
        "Give a checkpoint folder in diffusers or the original layout.\n",
    )


def test_verify_calls_a_folder_by_its_name(
    models: Program, tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    (folder / VAE_FILE).unlink()
    bad = models("verify", str(folder))
    assert (bad.code, bad.out) == (
        1,
        f"{folder}: has no vae/diffusion_pytorch_model.safetensors. "
        "Give a complete checkpoint in diffusers layout.\n",
    )


def test_names_from_the_hub_do_not_steer_the_terminal(server: Hub, models: Program) -> None:
    server.repositories["owner/lora"] = {"\x1b[2Ja.safetensors": b"a"}
    refused = models("pull", "owner/lora/b.safetensors")
    assert refused.err == (
        "error: owner/lora/b.safetensors has no b.safetensors. "
        "Known: owner/lora/\\x1b[2Ja.safetensors.\n"
    )


def test_no_network_no_access_and_no_room(
    server: Hub, cache: Path, models: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files_refused = (403, {"X-Error-Code": "GatedRepo"})
    address = huggingface_hub.constants.ENDPOINT
    assert models("pull", "owner/tiny").err.splitlines()[-1] == (
        f"error: owner/tiny is gated. Ask for access at {address}/owner/tiny, "
        "then log in with 'hf auth login'."
    )
    server.files_refused = None
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 9})())
    assert models("pull").err.startswith(f"error: owner/tiny and {LORA} takes 1.")
    monkeypatch.undo()
    use_hub("http://127.0.0.1:9", cache, monkeypatch)
    assert models("pull", "owner/name").err == (
        f"error: owner/name is not in the cache ({cache}) and http://127.0.0.1:9 cannot be "
        "reached. Connect to the network to download it, or copy the cache of a machine that has "
        "it.\n"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert models("pull", "owner/name").err == (
        f"error: owner/name is not in the cache ({cache}) and HF_HUB_OFFLINE is set. Unset it to "
        "download it, or copy the cache of a machine that has it.\n"
    )


def test_stopping_and_going_on(
    server: Hub, models: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_files = hub.fetch_files

    def stop(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "fetch_files", stop)
    result = models("pull", "owner/tiny")
    assert result.code == 130
    assert result.err.splitlines()[-1] == ("interrupted. Run the same command again to continue.")
    monkeypatch.setattr(hub, "fetch_files", fetch_files)
    assert models("pull", "owner/tiny").code == 0
    assert server.sent_ranges()


def test_the_environment_counts_and_nothing_heavy_is_loaded(server: Hub, tmp_path: Path) -> None:
    """A mirror, another cache, and the embedded toy model as a repository of 15 MB."""
    server.add("owner/toy", hub.TOY_FOLDER)
    code = (
        "import sys\n"
        "from everanimate_cli.cli import main\n"
        "assert main(['models', 'pull', 'owner/toy']) == 0\n"
        "assert main(['models', 'path', 'owner/toy']) == 0\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'hf_xet'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "home" / "hub" / "models--owner--toy" / "snapshots" / COMMIT
    assert done.stdout == f"{folder}\n{folder}\n"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(server.repositories["owner/toy"])
    for name, content in server.repositories["owner/toy"].items():
        assert (folder / name).read_bytes() == content


# --- other layouts in `animate` ------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks in both layouts, and the transformer in a file."""
    folder = tmp_path_factory.mktemp("layouts")
    networks = build_original_networks()
    write_original(folder / "wan", networks)
    write_diffusers(folder / "diffusers", networks)
    tensors = name_transformer(networks["transformer"])
    save_file(
        {f"model.diffusion_model.{key}": value for key, value in tensors.items()},
        folder / "animate.safetensors",
    )
    return folder


def test_all_layouts_give_the_same_video(animate: Animate, place: Path, layouts: Path) -> None:
    models = {
        "diffusers.mp4": ("--model", str(layouts / "diffusers")),
        "original.mp4": ("--model", str(layouts / "wan")),
        "file.mp4": (
            *("--model", str(layouts / "wan")),
            *("--transformer", str(layouts / "animate.safetensors")),
        ),
    }
    plans = []
    for output, words in models.items():
        plan = animate(*words, "-o", output, "--frames", "9", "--dry-run", "--json")
        assert (plan.code, plan.err) == (0, "")
        facts = json.loads(plan.out)
        assert facts.pop("output") == output
        facts.pop("model")
        assert ("transformer" in facts) == (output == "file.mp4")
        facts.pop("transformer", None)
        plans.append(facts)
        assert animate(*words, "-o", output, "--frames", "9", "--keep-run").code == 0
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["weights_mib"]["transformer"] > 0
    assert len({(place / output).read_bytes() for output in models}) == 1
    # Which file it was is part of the request that a run belongs to.
    request = json.loads((place / "file.mp4.run" / "run.json").read_text())
    other = json.loads((place / "original.mp4.run" / "run.json").read_text())
    different = {key for key in request if request[key] != other.get(key)}
    assert different == {"--model sha256"}


def test_a_transformer_that_is_not_there(animate: Animate) -> None:
    missing = animate("--transformer", "none.gguf")
    assert (missing.code, missing.err) == (
        2,
        "error: --transformer none.gguf does not exist. "
        "Give a .safetensors or .gguf file of a Wan2.2-Animate transformer.\n",
    )
