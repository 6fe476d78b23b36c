"""The model in plain PyTorch, as a user of that library would write it: what the speed comparisons beside it run.

Parameter names are those of model files, so the shipped base loads as it is. Norms are computed once for queries and
keys, attention is PyTorch's fused one unless said otherwise, and query rows can be run against a context whose keys and values are at hand.
Shapes: B tables, T rows of which n are context, H columns, E cell width, C row tokens, D = C * E.
"""

import json
import math
import struct

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Whether attention is PyTorch's fused one, which torch.func can't batch, or written out.
FUSED = True
NANO = dict(cell=32, column_blocks=2, column_heads=4, inducing=16, row_blocks=2, row_heads=4, tokens=4,
            context_blocks=5, context_heads=4, hidden=32, classes=10, text=64)


def space(**parts):
    """A module that only holds others under their names."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class Scaling(nn.Module):
    """Queries times a network of the context's size and a gate of their own."""

    def __init__(self, heads, head_width, hidden):
        super().__init__()
        width = heads * head_width
        self.shape = (heads, 1, head_width)
        self.base_mlp = nn.Sequential(nn.Linear(1, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.query_mlp = nn.Sequential(nn.Linear(head_width, hidden), nn.GELU(), nn.Linear(hidden, head_width))

    def forward(self, queries, rows):
        base = self.base_mlp(queries.new_full((1, 1), math.log(max(rows, 1)))).view(self.shape)
        return queries * base * (1 + torch.tanh(self.query_mlp(queries)))


class Attention(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.heads, self.width = heads, width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(width, width)
        if hidden:
            self.ssmax_layer = Scaling(heads, width // heads, hidden)
        self.scaled = bool(hidden)

    def parts(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def keys_values(self, normed, angles=None):
        both = F.linear(normed, self.in_proj_weight[self.width:], self.in_proj_bias[self.width:])
        keys, values = (self.parts(half) for half in both.chunk(2, -1))
        return (keys if angles is None else turn(keys, angles)), values

    def forward(self, normed, keys_values, angles=None):
        queries = self.parts(F.linear(normed, self.in_proj_weight[:self.width], self.in_proj_bias[:self.width]))
        if angles is not None:
            queries = turn(queries, angles)
        keys, values = keys_values
        if self.scaled:
            queries = self.ssmax_layer(queries, keys.shape[-2])
        read = attend(queries, keys, values)
        return self.out_proj(read.transpose(-3, -2).flatten(-2))


def attend(queries, keys, values):
    if FUSED:
        return F.scaled_dot_product_attention(queries, keys, values)
    weights = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return weights.softmax(-1) @ values


def turn(x, angles):
    """Rotary positions, halves convention; angles are cosines and sines (positions, half of a head)."""
    cos, sin = (a[: x.shape[-2]] for a in angles)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    def __init__(self, width, heads, hidden=0):
        super().__init__()
        self.attn = Attention(width, heads, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, normed, keys_values, angles=None):
        x = x + self.attn(normed, keys_values, angles)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class Inducing(nn.Module):
    """Inducing points read the context rows of a column, all rows read the inducing points."""

    def __init__(self, width, heads, points, hidden):
        super().__init__()
        self.ind_vectors = nn.Parameter(torch.randn(points, width) * 0.02)
        self.multihead_attn1 = Block(width, heads, hidden)
        self.multihead_attn2 = Block(width, heads)

    def summary(self, context):
        gather, spread = self.multihead_attn1, self.multihead_attn2
        points = self.ind_vectors.expand(*context.shape[:-2], -1, -1)
        kept = gather(points, gather.norm1(points), gather.attn.keys_values(gather.norm1(context)))
        return spread.attn.keys_values(spread.norm1(kept))

    def forward(self, cells, summary):
        return self.multihead_attn2(cells, self.multihead_attn2.norm1(cells), summary)


class Twin(nn.Module):
    def __init__(self, cell, column_blocks, column_heads, inducing, row_blocks, row_heads, tokens, context_blocks,
                 context_heads, hidden, classes, text):
        super().__init__()
        vector = cell * tokens
        self.classes, self.tokens = classes, tokens
        self.col_embedder = space(
            in_linear=nn.Linear(3, cell),
            y_encoder=nn.Linear(classes, cell),
            tf_col=space(blocks=nn.ModuleList(Inducing(cell, column_heads, inducing, hidden) for _ in range(column_blocks))),
        )
        half = cell // row_heads // 2
        frequencies = 1e5 ** (-torch.arange(half) / half)
        self.row_interactor = space(
            cls_tokens=nn.Parameter(torch.randn(tokens, cell) * 0.02),
            out_ln=nn.LayerNorm(cell),
            tf_row=space(
                blocks=nn.ModuleList(Block(cell, row_heads) for _ in range(row_blocks)),
                rope=space(freqs=nn.Parameter(frequencies, requires_grad=False)),
            ),
        )
        self.icl_predictor = space(
            y_encoder=nn.Linear(classes, vector),
            tf_icl=space(blocks=nn.ModuleList(Block(vector, context_heads, hidden) for _ in range(context_blocks))),
            ln=nn.LayerNorm(vector),
            decoder=nn.Sequential(nn.Linear(vector, 2 * vector), nn.GELU(), nn.Linear(2 * vector, classes)),
        )
        self.feature_tokens = nn.Linear(text, cell, bias=False)

    def groups(self, values):
        """Values (B, T, H) to cells of three columns (B, H, T, 3): shifts of 1, 2 and 4 in a circle."""
        at = torch.arange(values.shape[-1])
        shifted = [values[..., (at + (1 << i)) % len(at)] for i in range(3)]
        return torch.stack(shifted, -1).transpose(1, 2)

    def embedded(self, values, labels):
        """Cells (B, H, T, E) of rows whose first are labelled (B, n), and each block's summary of them."""
        column, n = self.col_embedder, labels.shape[1]
        cells = column.in_linear(self.groups(values))
        known = column.y_encoder(F.one_hot(labels, self.classes).float())[:, None]
        cells = torch.cat([cells[:, :, :n] + known, cells[:, :, n:]], 2)
        summaries = []
        for block in column.tf_col.blocks:
            summaries.append(block.summary(cells[:, :, :n]))
            cells = block(cells, summaries[-1])
        return cells, summaries

    def vectors(self, cells):
        """Row vectors (.., D) of cells (.., H, E)."""
        row = self.row_interactor
        z = torch.cat([row.cls_tokens.expand(*cells.shape[:-2], -1, -1), cells], -2)
        turned = torch.outer(torch.arange(z.shape[-2], dtype=z.dtype), row.tf_row.rope.freqs)
        angles = turned.cos(), turned.sin()
        for block in row.tf_row.blocks[:-1]:
            normed = block.norm1(z)
            z = block(z, normed, block.attn.keys_values(normed, angles), angles)
        last = row.tf_row.blocks[-1]
        normed = last.norm1(z)
        read = last(z[..., : self.tokens, :], normed[..., : self.tokens, :], last.attn.keys_values(normed, angles), angles)
        return row.out_ln(read).flatten(-2)

    def scores(self, rows):
        return self.icl_predictor.decoder(self.icl_predictor.ln(rows))

    def labelled(self, vectors, labels):
        return vectors + self.icl_predictor.y_encoder(F.one_hot(labels, self.classes).float())

    def forward(self, values, labels):
        """Class scores (B, T - n, K) of the rows without label."""
        n = labels.shape[1]
        vectors = self.vectors(self.embedded(values, labels)[0].transpose(1, 2))
        rows = torch.cat([self.labelled(vectors[:, :n], labels), vectors[:, n:]], 1)
        *blocks, last = self.icl_predictor.tf_icl.blocks
        for block in blocks:
            normed = block.norm1(rows)
            rows = block(rows, normed, block.attn.keys_values(normed[:, :n]))
        normed = last.norm1(rows)
        return self.scores(last(rows[:, n:], normed[:, n:], last.attn.keys_values(normed[:, :n])))

    def context(self, values, labels):
        """What query rows read: the column summaries, and keys and values of each in-context block."""
        cells, summaries = self.embedded(values, labels)
        rows, kept = self.labelled(self.vectors(cells.transpose(1, 2)), labels), []
        for block in self.icl_predictor.tf_icl.blocks:
            normed = block.norm1(rows)
            kept.append(block.attn.keys_values(normed))
            rows = block(rows, normed, kept[-1])
        return summaries, kept

    def query_cells(self, values, summaries):
        """Cells (B, T, H, E) of query rows (B, T, H)."""
        cells = self.col_embedder.in_linear(self.groups(values))
        for block, summary in zip(self.col_embedder.tf_col.blocks, summaries):
            cells = block(cells, summary)
        return cells.transpose(1, 2)

    def query_scores(self, cells, kept):
        """Class scores (.., T, K) of query cells (.., T, H, E) against kept keys and values."""
        rows = self.vectors(cells)
        for block, keys_values in zip(self.icl_predictor.tf_icl.blocks, kept):
            rows = block(rows, block.norm1(rows), keys_values)
        return self.scores(rows)


def load(path, **sizes):
    """The model of a file (safetensors), of as many classes as it has; every tensor must be there."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(length)), file.read()
    header.pop("__metadata__", None)
    tensors = {}
    for name, facts in header.items():
        first, last = facts["data_offsets"]
        kind = {"F32": np.float32, "F16": np.float16}[facts["dtype"]]
        numbers = np.frombuffer(data[first:last], dtype=kind).astype(np.float32)
        tensors[name] = torch.from_numpy(numbers.reshape(facts["shape"]))
    model = Twin(**{**sizes, "classes": len(tensors["icl_predictor.decoder.2.bias"])})
    model.load_state_dict(tensors)
    return model
