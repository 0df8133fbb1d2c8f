"""What a model in memory is known by, where no file says which it is."""

from __future__ import annotations

import hashlib
import secrets

import torch
from transformers import PreTrainedModel


def digest_tensors(model: PreTrainedModel) -> str:
    """`"sha256:..."` of a model's configuration and of every tensor as it is now. Where some are not in
    memory (accelerate keeps them on the disk) it is of nothing else, and never the same again.
    """
    found = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            found.update(secrets.token_bytes())
        else:
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"sha256:{found.hexdigest()}"
