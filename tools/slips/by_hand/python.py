# SPDX-License-Identifier: MIT
"""Slips of the operators in Python, of the functions and of the layers."""

SLIPS = {
    "convnn_kernels/checks.py": [
        (
            'raise RuntimeError(f"{op}: scale must be finite, got {scale:g}")',
            "pass",
            "a scale that is not finite is accepted where only metadata are checked",
        ),
        (
            "if list(key_mask.shape) != list(key.shape[:-1]):",
            "if key_mask.numel() != key.shape[:-1].numel():",
            "a mask of another shape with as many elements is accepted",
        ),
        (
            "again = in_order[..., 1:][in_order[..., 1:] == in_order[..., :-1]]",
            "again = in_order[..., 1:2][in_order[..., 1:2] == in_order[..., :1]]",
            "only the first two candidates must be distinct",
        ),
        (
            "wrong = ((tensor < 0) | (tensor >= rows)).flatten().nonzero()",
            "wrong = (tensor >= rows).flatten().nonzero()",
            "negative indices are accepted on a GPU that checks them",
        ),
    ],
    "convnn_kernels/transforms.py": [
        (
            "is_shared = arg.dim() == own_dims\n"
            "        return arg if is_shared else arg.expand(lead[0], *arg.shape)",
            "return arg",
            "restrictions that are not mapped have no mapped dimension",
        ),
        (
            '"convnn::forward": {"query", "key", "value", "key_mask"},',
            '"convnn::forward": {"query", "key", "value"},',
            "a mask that is not mapped is not repeated for the entries",
        ),
        (
            '"convnn::select": {"query", "key", "key_mask"},',
            '"convnn::select": {"query", "key"},',
            "a mask that is not mapped is not repeated for the entries of select",
        ),
        (
            'getattr(arguments, "need_weight", False) or getattr(arguments, "need_bias", False)',
            'getattr(arguments, "need_weight", False)',
            "the gradient of the bias alone is summed over the mapped dimension",
        ),
        (
            'getattr(arguments, "need_weight", False) or getattr(arguments, "need_bias", False)',
            'getattr(arguments, "need_bias", False)',
            "the gradient of the weight alone is summed over the mapped dimension",
        ),
        (
            '_CAST = {"value", "weight", "bias"}',
            '_CAST = {"query", "key", "value", "weight", "bias"}',
            "autocast rounds what decides which tokens are neighbors",
        ),
        (
            '_CAST = {"value", "weight", "bias"}',
            '_CAST = {"value", "weight"}',
            "autocast leaves the bias as it is",
        ),
        (
            "and arg.dtype is not torch.float64",
            "and True",
            "autocast rounds float64",
        ),
        (
            '_OWN_DIMS = {"candidates": 1, "self_indices": 1, "key_range": 2}',
            '_OWN_DIMS = {"candidates": 1, "self_indices": 1, "key_range": 1}',
            "ranges that are not mapped count as those of the entries",
        ),
        (
            "pairs = zip(args, in_dims, strict=True)\n"
            "        return [arg if dim is None else arg.select(dim, i)",
            "pairs = zip(args, in_dims, strict=True)\n"
            "        return [arg if dim is None else arg.select(0, i)",
            "entries are taken along the first dimension",
        ),
        (
            "dtype = torch.promote_types(query.dtype, key.dtype)",
            "dtype = query.dtype",
            "a key of a wider dtype is rounded to that of query",
        ),
    ],
    "convnn_kernels/autograd.py": [
        (
            'through_output = grad_output is not None and ctx.rho != "ones"',
            "through_output = grad_output is not None",
            "with rho of ones, gradients of zero are computed",
        ),
        (
            "needed | {",
            "{} | {",
            "query and key get no gradient from the output",
        ),
        (
            "candidates if is_shared else None,",
            "None,",
            "backward does not know the shared candidates",
        ),
        (
            "is_shared = candidates is not None and candidates.dim() == 1",
            "is_shared = candidates is not None",
            "backward takes the candidates of each batch element as shared",
        ),
        (
            'ctx.has_bias = getattr(arguments, "bias", None) is not None',
            "ctx.has_bias = True",
            "backward takes every call as one with a bias",
        ),
        (
            'grads["bias"] = value.new_zeros(channels)',
            "pass",
            "the bias gets no zeros where every gradient must be a tensor",
        ),
        (
            "channels = value.shape[-1] if weight is None else weight.shape[0]\n        grads",
            "channels = value.shape[-1]\n        grads",
            "the zeros of a bias have as many elements as value has channels",
        ),
        (
            'raise RuntimeError(f"{ctx.op}: second derivatives are not implemented")',
            "return tuple(None for _ in ctx.needs_input_grad)",
            "second derivatives are silently zero",
        ),
    ],
    "convnn_kernels/ops.py": [
        (
            "dtype = torch.float64 if query.dtype is torch.float64 else torch.float32",
            "dtype = torch.float32",
            "fake similarities of float64 have float32",
        ),
        (
            "channels = value.shape[-1] if weight is None else weight.shape[0]",
            "channels = value.shape[-1]",
            "fake outputs have as many channels as value",
        ),
        (
            "needs_bias = arguments.need_bias and arguments.has_bias",
            "needs_bias = arguments.need_bias",
            "a bias that there is not has a fake gradient",
        ),
        (
            'for _device in ("CPU", "CUDA"):',
            'for _device in ("CPU",):',
            "autocast does nothing on CUDA",
        ),
    ],
    "convnn_kernels/functional.py": [
        (
            "beyond = similarities < -(radius * radius)  # [..., N, k]",
            "beyond = similarities <= -(radius * radius)  # [..., N, k]",
            "a neighbor exactly at the radius is missing",
        ),
        (
            'is_sorted = order == "similarity" and (self_indices is None or exclude_self)',
            'is_sorted = order == "similarity"',
            "a token beyond the radius of itself stays first",
        ),
        (
            "indices = indices.masked_fill(beyond, 0)",
            "",
            "neighbors beyond the radius keep their index",
        ),
        (
            "places = beyond.byte().argsort(dim=-1, stable=True)",
            "places = beyond.byte().argsort(dim=-1, stable=True, descending=True)",
            "neighbors beyond the radius come first",
        ),
    ],
    "convnn_kernels/nn/candidates.py": [
        (
            "x = ((x ^ (x >> 16)) * 0x61C88647) & 0xFFFFFFFF",
            "x = ((x ^ (x >> 16)) * 0x61C88649) & 0xFFFFFFFF",
            "a saved model draws other candidates",
        ),
        (
            "x = ((x ^ (x >> 15)) * 0x46A5B2C7) & 0xFFFFFFFF",
            "x = ((x ^ (x >> 14)) * 0x46A5B2C7) & 0xFFFFFFFF",
            "a saved model draws other candidates: another shift",
        ),
        (
            "drawn = ranks.argsort(stable=True)",
            "drawn = ranks.argsort(stable=True, descending=True)",
            "a saved model draws other candidates: the last instead of the first",
        ),
        (
            "words = ((seed > 0).long() << torch.arange(32, device=seed.device)).sum(1)  # [2]",
            "words = ((seed > 0).long() << torch.arange(32, device=seed.device)).sum(1).flip(0)",
            "a saved model draws other candidates: its words swapped",
        ),
        (
            'state_dict[prefix + "seed"] = (2.0 * bits - 1).view(2, 32)',
            'state_dict[prefix + "seed"] = (2.0 * bits - 1).view(32, 2).T',
            "the seed of an older state dict becomes another",
        ),
        (
            "        r: int,\n        include_self: bool = True,",
            "        r: int,\n        include_self: bool = False,",
            "random candidates leave out the token itself by default",
        ),
        (
            "stride: int | None = None,\n        include_self: bool = True,",
            "stride: int | None = None,\n        include_self: bool = False,",
            "candidates of a grid leave out the token itself by default",
        ),
        (
            "        self,\n        include_self: bool = False,\n        *,",
            "        self,\n        include_self: bool = True,\n        *,",
            "all candidates have the token itself by default",
        ),
        (
            "if self.seed is not None and not self.training:",
            "if self.seed is not None:",
            "candidates are fixed in training, too",
        ),
        (
            "axes = [steps * size // side + start for size in sizes]",
            "axes = [steps * (size // side) + start for size in sizes]",
            "a grid is spaced by whole steps",
        ),
        (
            "rows = (rows.unsqueeze(1) * (size + 2 * padding) + axis).flatten()",
            "rows = (rows.unsqueeze(1) * size + axis).flatten()",
            "rows of a grid do not count the padding",
        ),
    ],
    "convnn_kernels/nn/convnn.py": [
        (
            "return tokens / (deviation + 1e-6)",
            "return tokens / deviation",
            "equal features are divided by zero",
        ),
        (
            "key_range = torch.stack([torch.zeros_like(queries), queries + 1], -1)  # [N, 2]",
            "key_range = torch.stack([torch.zeros_like(queries), queries], -1)  # [N, 2]",
            "a causal token does not see itself",
        ),
        (
            "correction = int(self.in_channels > 1 or tokens.shape[1] > 1)",
            "correction = 0",
            "the deviation of a map is biased",
        ),
        (
            "self.bias.requires_grad_(conv.bias.requires_grad)",
            "pass",
            "a frozen bias of a convolution can be trained again",
        ),
        (
            "inputs = self.k * (1 if self.weight is None else self.weight.shape[1])",
            "inputs = self.k",
            "a bias is initialized for one channel",
        ),
        (
            "candidates.self_similarity,",
            "None,",
            "the similarity of a token to itself is its own",
        ),
        (
            "dtype = torch.float64 if x.dtype == torch.float64 else torch.float32\n"
            "        key = self._grid(shape, dtype, x.device)",
            "dtype = x.dtype\n        key = self._grid(shape, dtype, x.device)",
            "coordinates that are compared are rounded to 16 bits",
        ),
    ],
}
