"""One context token that counts n times is n equal ones, in the network's output and in every gradient."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel

from diffusion_gym.models.repeated_token import RepeatedTokenAttention

TIMES = 256


@pytest.fixture(params=[None, "rms_norm"])
def networks(request):
    """The same network with diffusers' own attention, and with ours; one layer attends to the image twice."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=4,
        qk_norm=request.param,
        dual_attention_layers=(1,),
    ).double()
    ours = copy.deepcopy(network)
    ours.set_attn_processor(RepeatedTokenAttention(TIMES))
    return network, ours


def test_it_equals_many_equal_tokens_in_output_and_gradients(networks):
    generator = torch.Generator().manual_seed(1)
    latents, context, pooled = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 4, 4), (2, 5, 12), (2, 6))
    )
    one = torch.zeros(2, 1, 12, dtype=torch.float64)
    outputs = [
        network(
            hidden_states=latents,
            timestep=torch.tensor([300.0, 900.0]),
            encoder_hidden_states=torch.cat([context, one.expand(-1, times, -1)], dim=1),
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        for network, times in zip(networks, (TIMES, 1), strict=True)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    gradients = [{name: each.grad for name, each in network.named_parameters()} for network in networks]
    largest = max(value.abs().max() for value in gradients[0].values() if value is not None)
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert (found is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(largest), msg=name)
