"""VIF (ictnlp/VIF), straight from the paper: a latent map of the image, mixed into the attention of deep layers.

`weights` is a dict of NumPy arrays; a Linear is (weight [out, in], bias [out]). The generator runs in float64.
"""

import math
from contextlib import ExitStack

import numpy as np
import torch
from plain import SHORT, attention, vicuna


def linear(x, p):
    return x @ p["weight"].T + p["bias"]


def layer_norm(x, p):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x, axis=-1):
    x = np.exp(x - x.max(axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


def attend(queries, keys, p, heads):
    """Multi-head attention of queries [n, D] to keys [m, D], with biases."""
    q, k, v = linear(queries, p["q"]), linear(keys, p["k"]), linear(keys, p["v"])
    out, size = [], q.shape[1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        out.append(softmax(q[:, part] @ k[:, part].T / math.sqrt(size)) @ v[:, part])
    return linear(np.concatenate(out, axis=1), p["o"])


def encode(p, vision, text, heads):
    """The vision stream [P, D] after the encoder's layers."""
    v, t = linear(vision, p["vision_in"]), linear(text, p["text_in"])
    for layer in p["layers"]:
        x = layer_norm(v, layer["norm1_v"])
        v = v + attend(x, x, layer["self_v"], heads)
        x = layer_norm(t, layer["norm1_t"])
        t = t + attend(x, x, layer["self_t"], heads)
        v = v + attend(layer_norm(v, layer["norm2_v"]), t, layer["cross_v"], heads)
        t = t + attend(layer_norm(t, layer["norm2_t"]), v, layer["cross_t"], heads)
        v = v + linear(gelu(linear(layer_norm(v, layer["norm3_v"]), layer["up_v"])), layer["down_v"])
        t = t + linear(gelu(linear(layer_norm(t, layer["norm3_t"]), layer["up_t"])), layer["down_t"])
    return layer_norm(v, p["norm_v"])


def generate_map(weights, vision, question, grid, *, heads=4, minimum_sigma=0.035, norm="sum", noise=None):
    """The prior's map [P] over the image, from hidden states of its tokens and of all others (eq. 1, 3 and 4)."""
    slots = attend(weights["queries"], encode(weights["prior"], vision, question, heads), weights["compress"], heads)
    z = linear(slots, weights["prior_mu"])
    if noise is not None:
        z = z + np.exp(0.5 * np.clip(linear(slots, weights["prior_logvar"]), -5, 5)) * noise
    centres = 1 / (1 + np.exp(-linear(z, weights["position"])))
    spreads = np.log1p(np.exp(linear(z, weights["sigma"])))[:, 0] + minimum_sigma
    shares = softmax(linear(z, weights["mixture"])[:, 0])
    return mixture(centres, spreads, shares, grid, norm)


def mixture(centres, spreads, shares, grid, norm):
    h, w = grid
    heat = np.zeros(h * w)
    for r in range(h):
        for c in range(w):
            u, v = (c / (w - 1) if w > 1 else 0), (r / (h - 1) if h > 1 else 0)
            for (x, y), s, share in zip(centres, spreads, shares, strict=True):
                heat[r * w + c] += share * math.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * s**2))
    return heat / (heat.sum() + 1e-6) if norm == "sum" else softmax(heat)


def inject(probs, heat, columns, rows, alpha):
    """Attention probabilities [N, T, S] with the map mixed into rows, masked and renormalised (eq. 6 and 7)."""
    out, (T, S) = probs.clone(), probs.shape[1:]
    scattered = torch.zeros(S)
    scattered[columns] = torch.as_tensor(heat, dtype=probs.dtype)
    for t in rows:
        visible = torch.arange(S) <= t + S - T
        mixed = ((1 - alpha) * probs[:, t] + alpha * scattered) * visible
        out[:, t] = mixed / (mixed.sum(dim=-1, keepdim=True) + 1e-9)
    return out


def vif(llava, image, question, maker, *, pairs, alpha=0.5, inject_decode=True, limit=128, ending="\n" + SHORT):
    """(maps by pair, answer). maker(vision states, text states) -> map [P]; pairs: (extraction, injection) layers."""
    text, maps = vicuna(f"<image>\n{question}{ending}"), {}
    columns, length = llava.columns(text), len(llava.tokens(text)[0])
    words = [t for t in range(length) if t not in set(columns)]

    def extract(source):
        def hook(_, __, out):
            hidden = (out[0] if isinstance(out, tuple) else out)[0]
            if len(hidden) == length:  # prefill; the prompt's maps hold for the answer too
                maps[source] = maker(hidden[columns].double().numpy(), hidden[words].double().numpy())

        return hook

    def mix(layer, probs):
        sources = [source for source, target in pairs if target == layer]
        if not sources or (probs.shape[2] == 1 and not inject_decode):
            return probs
        rows = words if probs.shape[2] == length else range(probs.shape[2])
        return inject(probs[0], maps[sources[0]], columns, rows, alpha)[None]

    with ExitStack() as stack:
        for source, _ in pairs:
            stack.callback(llava.layers[source].register_forward_hook(extract(source)).remove)
        stack.enter_context(attention(probs=mix))
        return maps, llava.generate([image], text, limit)
