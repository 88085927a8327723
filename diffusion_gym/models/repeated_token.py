"""Attention to a context token that stands for many equal ones, at the cost of one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class RepeatedTokenAttention:
    """Joint attention of SD3's transformer in which the last context token counts `times` times.

    SD3 without T5 feeds 256 zeros as context. Equal context tokens stay equal through all layers, as they have no
    positions, so attention to n of them is attention to one of n times the weight: log n on its logits. The layers are
    those of diffusers' `JointAttnProcessor2_0`, in the same order.

    Args:
        times: how many equal tokens the last one stands for.
    """

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend: `(N, L, D)` of the image and `(N, M, D)` of the context; of the image alone without a context."""
        number = hidden_states.shape[0]

        def heads(states: torch.Tensor, norm: Any = None) -> torch.Tensor:
            split = states.view(number, -1, attn.heads, states.shape[-1] // attn.heads).transpose(1, 2)
            return split if norm is None else norm(split)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        bias = None
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=2)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=2)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
            bias = query.new_zeros(1, 1, 1, key.shape[2])
            bias[..., -1] = math.log(self.times)
            bias = bias.expand(1, 1, query.shape[2], -1)
        states = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        states = states.transpose(1, 2).flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](states[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return image
        context = states[:, hidden_states.shape[1] :]
        return image, context if attn.context_pre_only else attn.to_add_out(context)
