"""`train-lora` over a base in 8 or 4 bits, with the packages that store it so.

Needs bitsandbytes and torchao (`pip install bitsandbytes torchao`), which a plain run of the tests
does not: run with `-m slow`.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from media import decode_video
from ranks import Command
from studio import Outcome, Program
from tiny import CLIP_DIM, INNER_DIM, LATENT_CHANNELS, TEXT_DIM, build_tiny_pipeline
from torch import Tensor
from trainings import largest_difference, launch, losses, words, write_clips

from everanimate_cli.cli import main
from everanimate_cli.lora_adapter import attach_lora, lora_parameters
from everanimate_cli.offloading import store_blocks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FORMATS = ("fp8", "int8", "nf4")
PRECISIONS = {"fp8": "fp8", "int8": "torchao-int8", "nf4": "nf4"}
# Of the velocity, against the same network in float32: what the format costs.
LARGEST_ERROR = {"fp8": 0.05, "int8": 0.02, "nf4": 0.2}
LOOK = ("--validate-every", "2", "--validation-chunks", "1", "--validation-steps", "1")

Train = Callable[..., Outcome]


@pytest.fixture
def train(place: Path, program: Program) -> Train:
    """Runs `everanimate train-lora` on two clips with the tiny model and further words."""
    write_clips(place)

    def run(output: str, *more: str) -> Outcome:
        return program(*words(output, *more))

    return run


def make_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": draw(1, 2 * LATENT_CHANNELS + 4, 7, 6, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, 512, TEXT_DIM),
        "encoder_hidden_states_image": draw(1, 17, CLIP_DIM),
        "pose_embeds": draw(1, INNER_DIM, 3, 3, 4),
        "face_tokens": draw(1, 3, 5, INNER_DIM),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", FORMATS)
def test_gradients_reach_the_adapters_and_nothing_else(how: str, dtype: torch.dtype) -> None:
    """Nearly those of the base that is not packed, also after a look in evaluation mode."""
    found = {}
    for name in ("full", PRECISIONS[how]):
        network = build_tiny_pipeline(dtype=dtype).transformer
        store_blocks(network, name, CPU)
        attach_lora(network, rank=3, alpha=3, seed=0)
        for key, parameter in lora_parameters(network).items():
            assert parameter.dtype == torch.float32
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.manual_seed(5))
        before = [value.detach().clone() for value in network.parameters()]
        inputs = make_inputs()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            look = network.eval()(**inputs)
        network.train().enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            velocity = network(**inputs)
        torch.testing.assert_close(velocity, look, rtol=0, atol=1e-6)
        velocity.float().square().mean().backward()
        trained = lora_parameters(network)
        with_gradient = {id(p) for p in network.parameters() if p.grad is not None}
        assert with_gradient == {id(parameter) for parameter in trained.values()}
        for value, old in zip(network.parameters(), before, strict=True):
            assert (
                torch.equal(value.detach().view(torch.uint8), old.view(torch.uint8))
                if (value.dtype == torch.uint8)
                else torch.equal(_plain(value), _plain(old))
            )
        gradient = torch.cat([parameter.grad.flatten() for parameter in trained.values()])  # type: ignore[union-attr]
        found[name] = (velocity.detach().float(), gradient)
    (velocity, gradient), (exact, exact_gradient) = found[PRECISIONS[how]], found["full"]
    error = (velocity - exact).norm() / exact.norm()
    assert 1e-4 < error < LARGEST_ERROR[how]
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.9


def _plain(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.dequantize() if hasattr(value, "qdata") else value).float()


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("mixed", [(), ("--dtype", "bfloat16"), ("--mixed-precision", "bf16")])
def test_it_learns_as_with_a_base_that_is_not_packed(
    train: Train, how: str, mixed: tuple[str, ...]
) -> None:
    more = ("--steps", "24", *mixed)
    assert train("full", *more).code == 0
    outcome = train("packed", *more, "--quantize-base", how)
    assert (outcome.code, outcome.out) == (0, "packed/lora.safetensors\n"), outcome.err
    exact, packed = np.array(losses(Path("full"))), np.array(losses(Path("packed")))
    assert packed[-8:].mean() < 0.9 * packed[:8].mean()
    assert abs(packed / exact - 1).max() < 0.1
    assert (packed != exact).all()


@pytest.mark.parametrize("how", FORMATS)
def test_a_stopped_training_goes_on_bit_for_bit(train: Train, how: str) -> None:
    more = ("--quantize-base", how, "--ema", "0.9", *LOOK)
    assert train("whole", *more, "--steps", "4").code == 0
    assert train("parts", *more, "--steps", "2").code == 0
    assert "from step 2 to step 4" in train("parts", *more, "--steps", "4").err
    for file in ("lora.safetensors", "checkpoint-000004.safetensors"):
        assert largest_difference(Path("whole", file), Path("parts", file)) == 0
    assert losses(Path("whole")) == losses(Path("parts"))
    # A look changes nothing of what is learnt.
    assert train("unseen", *more[:4], "--steps", "4").code == 0
    assert largest_difference(Path("whole/lora.safetensors"), Path("unseen/lora.safetensors")) == 0
    # The way to store the base, and who does it, belong to a training.
    message = f"--quantize-base was {how}, is none"
    assert message in train("parts", *more[2:], "--steps", "4").err


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("checkpointing", ["off", "offload"])
def test_checkpointing_saves_memory_only(train: Train, how: str, checkpointing: str) -> None:
    more = ("--quantize-base", how, "--steps", "2")
    assert train("on", *more).code == 0
    assert train("other", *more, "--gradient-checkpointing", checkpointing).code == 0
    assert largest_difference(Path("on/lora.safetensors"), Path("other/lora.safetensors")) < 1e-5


@pytest.mark.parametrize("how", FORMATS)
def test_the_lora_animates_over_the_plain_and_the_packed_base(
    train: Train, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--latent-cache", "cache", "--cache-samples", "2")
    for _ in range(2):  # the second one loads the transformer alone
        again = ("--steps", "2", "--overwrite", "--no-resume")
        assert train("out", *cache, "--quantize-base", how, *again).code == 0
    videos = []
    for lora in ("none", "out/lora.safetensors"):
        for precision in ("full", PRECISIONS[how]):
            file = Path(f"{len(videos)}.mp4")
            options = ["--lora", lora, "--precision", precision, "-o", str(file), "--quiet"]
            command = ["animate", "anna.png", "dance", "--model", "tiny", "--seconds", "0.6"]
            assert main([*command, *options]) == 0
            videos.append(decode_video(file)[1].astype(float))
    capsys.readouterr()
    none, _, trained, packed = videos
    assert abs(trained - none).mean() > 0.1
    assert abs(trained - packed).mean() < 8


@pytest.mark.parametrize("how", FORMATS)
def test_a_lora_is_trained_further(train: Train, how: str) -> None:
    """The sides of packed weights were taken for those of the layers."""
    assert train("first", "--steps", "2").code == 0
    more = ("--steps", "1", "--lr", "1e-9", "--init", "first/lora.safetensors")
    outcome = train("second", *more, "--quantize-base", how)
    assert outcome.code == 0, outcome.err
    first, second = Path("first/lora.safetensors"), Path("second/lora.safetensors")
    assert largest_difference(first, second) < 1e-6


@pytest.mark.parametrize("how", FORMATS)
def test_what_a_layer_has_unpacked_waits_for_its_backward_pass(how: str) -> None:
    """Not with bitsandbytes; the plan counts on it."""
    network = build_tiny_pipeline(dtype=torch.bfloat16).transformer
    weights = {
        name: layer.weight
        for name, layer in network.blocks.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    sizes = {weight.shape for weight in weights.values()}
    of_context = re.compile(r"attn2\.(to|add)_[kv]|^0\.attn1\.to_[qkv]")  # no gradient comes so far
    kept_numels = sorted(
        weight.numel() for name, weight in weights.items() if not of_context.search(name)
    )
    store_blocks(network, PRECISIONS[how], CPU)
    attach_lora(network, rank=3, alpha=3, seed=0)
    others = [value for name, value in network.named_parameters() if not name.startswith("blocks.")]
    plain = {value.untyped_storage().data_ptr() for value in others}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if {tensor.shape, tensor.shape[::-1]} & sizes and place not in plain:
            kept[place] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        network.train()(**make_inputs())
    assert {tensor.dtype for tensor in kept.values()} == (
        set() if how == "nf4" else {torch.bfloat16}
    )
    assert sorted(tensor.numel() for tensor in kept.values()) == (
        [] if how == "nf4" else kept_numels
    )


@pytest.mark.parametrize("how", ["fp8", "int8", "nf4"])
def test_a_compiled_network_learns_the_same(train: Train, how: str) -> None:
    more = ("--quantize-base", how, "--steps", "1")
    assert train("plain", *more).code == 0
    outcome = train("compiled", *more, "--compile")
    assert outcome.code == 0, outcome.err
    assert losses(Path("compiled")) == pytest.approx(losses(Path("plain")), rel=1e-4)


def test_two_processes_are_one_that_accumulates(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "tiny").symlink_to(tiny_model)
    write_clips(tmp_path)
    commands = []
    for how in FORMATS[1:]:
        base = ("--quantize-base", how)
        commands += [
            Command(words=words(how, *base, "--steps", "2")),
            Command(words=words("x", *base), sharing="fsdp2"),
        ]
        command = words(f"{how}-alone", *base, "--accumulate", "2", "--steps", "2", "-q")
        command[1] = str(tmp_path / "clips.csv")
        more = ["--model", str(tiny_model), "-o", str(tmp_path / f"{how}-alone")]
        assert main([*command, *more]) == 0
    answers = launch(tmp_path, commands)
    for index, how in enumerate(FORMATS[1:]):
        shared, refused = answers[2 * index], answers[2 * index + 1]
        assert shared[0].code == 0, shared[0].err
        made = [tmp_path / name / "lora.safetensors" for name in (how, f"{how}-alone")]
        assert largest_difference(*made) < 1e-4
        assert refused[0].code == 2
        assert refused[0].err.splitlines()[-1] == (
            f"error: --quantize-base {how} does not go with FSDP. "
            "Leave it out: FSDP2 and ZeRO-3 split the weights already."
        )
