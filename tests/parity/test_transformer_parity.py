"""`transformer.safetensors`: the network, and the ways of padding it that are known to be wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from torch import Tensor
from torch.nn.functional import pad

from everanimate_cli.transformer import EverAnimateTransformer3DModel

Golden = Callable[[str], dict[str, Tensor]]

# With sinusoids in float64 as in the released code, and in float32 as in diffusers.
TOLERANCE = 2e-5
TOLERANCE_FLOAT32 = 1e-4
# A wrong variant must miss by far: the smallest known effect is 0.3.
WRONG = 1e-2


class Case:
    """One golden case, run through the network in whole or in parts."""

    def __init__(
        self, transformer: EverAnimateTransformer3DModel, tensors: dict[str, Tensor], name: str
    ) -> None:
        self.transformer = transformer
        self.inputs = {
            key.removeprefix(f"{name}.in."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.in.")
        }
        self.velocity = tensors[f"{name}.out.velocity"]
        self.num_target_slots = self.inputs["pose_latents"].shape[2]
        self.num_identity_slots = self.inputs["latents"].shape[2] - self.num_target_slots
        self.hidden_states = torch.cat([self.inputs["latents"], self.inputs["y"]], dim=1)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Pose embedding and face tokens, as the product makes them."""
        return (
            self.transformer.embed_pose(self.inputs["pose_latents"]),
            self.transformer.embed_face(self.inputs["face_pixels"]),
        )

    def run(
        self, pose_embeds: Tensor, face_tokens: Tensor, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return self.transformer(
            self.hidden_states,
            self.inputs["timestep"].to(dtype),
            self.inputs["text_embeds"],
            self.inputs["clip_embeds"],
            pose_embeds,
            face_tokens,
        )

    def measure(self, velocity: Tensor) -> float:
        """Largest difference from the released output."""
        return (velocity - self.velocity).abs().max().item()


@pytest.fixture
def case(transformer: EverAnimateTransformer3DModel, golden: Golden, transformer_case: str) -> Case:
    return Case(transformer, golden("transformer"), transformer_case)


@pytest.fixture
def padded_case(transformer: EverAnimateTransformer3DModel, golden: Golden) -> Case:
    """The case with the most identity slots, and of these the longest."""
    tensors = golden("transformer")
    names = {key.split(".in.")[0] for key in tensors if ".in." in key}
    cases = [Case(transformer, tensors, name) for name in sorted(names)]
    return max(cases, key=lambda each: (each.num_identity_slots, each.num_target_slots))


def test_velocity_matches_the_released_network(case: Case) -> None:
    velocity = case.run(*case.embed())
    torch.testing.assert_close(velocity, case.velocity, rtol=0, atol=TOLERANCE)


def test_velocity_matches_with_the_sinusoids_of_diffusers(case: Case) -> None:
    velocity = case.run(*case.embed(), dtype=torch.float32)
    torch.testing.assert_close(velocity, case.velocity, rtol=0, atol=TOLERANCE_FLOAT32)


def test_stages_match_the_released_network(
    case: Case, golden: Golden, transformer_case: str
) -> None:
    tensors = golden("transformer")
    captured: dict[str, list[Tensor]] = {"motion_vec": [], "time_embed": []}
    modules = {
        "motion_vec": case.transformer.motion_encoder,
        "time_embed": case.transformer.condition_embedder.time_embedder,
    }
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _module, _args, output, name=name: captured[name].append(output)
        )
    pose_embeds, face_tokens = case.embed()
    case.run(pose_embeds, face_tokens)

    stages = {name: torch.cat(outputs) for name, outputs in captured.items()}
    for name, stage in {**stages, "face_tokens": face_tokens}.items():
        expected = tensors[f"{transformer_case}.mid.{name}"]
        torch.testing.assert_close(stage, expected, rtol=0, atol=TOLERANCE)


def test_one_identity_slot_is_diffusers_forward_bit_for_bit(
    padded_case: Case, config: Callable[[str], dict[str, object]]
) -> None:
    stock = WanAnimateTransformer3DModel(**config("transformer_config")).eval()
    stock.load_state_dict(padded_case.transformer.state_dict(), strict=True)
    inputs = padded_case.inputs
    hidden_states = padded_case.hidden_states[:, :, padded_case.num_identity_slots - 1 :]
    expected = stock(
        hidden_states,
        inputs["timestep"],
        inputs["text_embeds"],
        inputs["clip_embeds"],
        inputs["pose_latents"],
        inputs["face_pixels"],
        return_dict=False,
    )[0]
    padded_case.hidden_states = hidden_states
    velocity = padded_case.run(*padded_case.embed(), dtype=torch.float32)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=0)


def test_wrong_face_padding_misses(padded_case: Case) -> None:
    num_slots = padded_case.num_identity_slots
    assert num_slots > 1
    pose_embeds, face_tokens = padded_case.embed()
    pose_embeds = pad(pose_embeds, (0, 0, 0, 0, num_slots, 0))
    frames = padded_case.inputs["face_pixels"]
    black = torch.full_like(frames[:, :, :1], -1).expand(-1, -1, 4 * num_slots, -1, -1)
    learned = padded_case.transformer.face_encoder.padding_tokens.expand(
        -1, num_slots, face_tokens.shape[2], -1
    )
    # With all groups handed in, the network pads nothing: the zero groups prove the method.
    zeros = pad(face_tokens, (0, 0, 0, 0, num_slots, 0))
    assert padded_case.measure(padded_case.run(pose_embeds, zeros)) < TOLERANCE
    wrong = {
        "learned tokens": torch.cat([learned, face_tokens], dim=1),
        "first face repeated": torch.cat(
            [face_tokens[:, :1].expand(-1, num_slots, -1, -1), face_tokens], dim=1
        ),
        "black faces": padded_case.transformer.embed_face(torch.cat([black, frames], dim=2)),
        "late by one": pad(face_tokens[:, :-1], (0, 0, 0, 0, num_slots + 1, 0)),
    }
    for name, groups in wrong.items():
        assert padded_case.measure(padded_case.run(pose_embeds, groups)) > WRONG, name


def test_wrong_pose_slots_miss(padded_case: Case) -> None:
    num_slots = padded_case.num_identity_slots
    assert num_slots > 1
    pose_embeds, face_tokens = padded_case.embed()
    face_tokens = pad(face_tokens, (0, 0, 0, 0, num_slots, 0))
    right = pad(pose_embeds, (0, 0, 0, 0, num_slots, 0))
    assert padded_case.measure(padded_case.run(right, face_tokens)) < TOLERANCE
    grey = torch.zeros_like(padded_case.inputs["pose_latents"][:, :, :1])
    wrong = {
        "from slot 1": pad(pose_embeds, (0, 0, 0, 0, 1, num_slots - 1)),
        "zero latents embedded": torch.cat(
            [padded_case.transformer.embed_pose(grey)] * num_slots + [pose_embeds], dim=2
        ),
    }
    for name, embeds in wrong.items():
        assert padded_case.measure(padded_case.run(embeds, face_tokens)) > WRONG, name


def test_face_batches_do_not_change_the_tokens(padded_case: Case) -> None:
    frames = padded_case.inputs["face_pixels"]
    expected = padded_case.transformer.embed_face(frames)
    for batch_size in (1, frames.shape[2]):
        tokens = padded_case.transformer.embed_face(frames, motion_encode_batch_size=batch_size)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=TOLERANCE)


def test_shapes_that_make_no_chunk_are_refused(padded_case: Case) -> None:
    pose_embeds, face_tokens = padded_case.embed()
    with pytest.raises(ValueError, match="do not make one chunk"):
        padded_case.run(pose_embeds, face_tokens[:, 1:])
    padded_case.inputs["text_embeds"] = padded_case.inputs["text_embeds"][:, 1:]
    with pytest.raises(ValueError, match="need 512 text tokens"):
        padded_case.run(pose_embeds, face_tokens)


def test_gradient_checkpointing_keeps_the_gradients(padded_case: Case) -> None:
    transformer = padded_case.transformer
    trained = transformer.blocks[0].attn1.to_q.weight.requires_grad_(True)
    gradients = []
    with torch.enable_grad():
        for is_on in (False, True):
            if is_on:
                transformer.enable_gradient_checkpointing()
            trained.grad = None
            padded_case.run(*padded_case.embed()).square().mean().backward()
            gradients.append(trained.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=0)


def test_bfloat16_keeps_the_delicate_parts_in_float32(padded_case: Case, tmp_path: Path) -> None:
    padded_case.transformer.save_pretrained(tmp_path)
    stock = WanAnimateTransformer3DModel.from_pretrained(tmp_path)
    assert stock.state_dict().keys() == padded_case.transformer.state_dict().keys()

    expected = padded_case.embed()[1]
    padded_case.transformer = EverAnimateTransformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16
    )
    assert padded_case.transformer.motion_encoder.motion_synthesis_weight.dtype == torch.float32
    assert padded_case.transformer.rope.freqs_cos.dtype == torch.float32
    pose_embeds, face_tokens = padded_case.embed()
    velocity = padded_case.run(pose_embeds, face_tokens)
    assert pose_embeds.dtype == face_tokens.dtype == velocity.dtype == torch.bfloat16
    torch.testing.assert_close(face_tokens.float(), expected, rtol=0.05, atol=0.1)
    error = (velocity.float() - padded_case.velocity).std() / padded_case.velocity.std()
    assert error < 0.05
