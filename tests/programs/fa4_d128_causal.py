"""FlashAttention-4's forward with head dimension 128 and a causal mask; takes the number of tokens. It needs
PyTorch and flash-attn-4.
"""

import sys

import torch
from flash_attn.cute import flash_attn_func

tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 512
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, tokens, 1, 128, generator=generator).to(torch.bfloat16).cuda() for _ in range(3))
flash_attn_func(q, k, v, causal=True)
