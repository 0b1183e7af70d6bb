"""VIF's generator and its injection as the paper and the released code write them: one sample, float64 loops."""

from math import erf

import jax
import numpy as np

from jaxvqa.vif.generator import GeneratorConfig


def plain(params):
    """The parameters in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def linear(p, x):
    return x @ p.kernel + p.bias


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p.scale + p.bias


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(w, queries, keys, seen):
    """One query and one head after the other, over the keys with `seen`."""
    out = np.tile(w.o.bias, (len(queries), 1))
    _, N, H = w.q.kernel.shape
    for n in range(N):
        q, k, v = (x @ p.kernel[:, n] + p.bias[n] for x, p in ((queries, w.q), (keys, w.k), (keys, w.v)))
        for t in range(len(queries)):
            scores = np.where(seen, k @ q[t] / np.sqrt(H), -np.inf)
            out[t] += softmax(scores) @ v @ w.o.kernel[n]
    return out


def mlp(w, x):
    h = linear(w.fc1, norm(w.norm3, x))
    return linear(w.fc2, np.vectorize(lambda a: a * (1 + erf(a / np.sqrt(2))) / 2)(h))


def branch(w, slots, c: GeneratorConfig, vision, text, padding=0):
    """Mean and log-variance [n, Z] of one sample; the release pads its text with `padding` zeros."""
    text = np.concatenate([text, np.zeros((padding, text.shape[1]))])
    real, e = np.arange(len(text)) < len(text) - padding, w.encoder
    v, t = linear(e.vision_in, vision), linear(e.text_in, text)
    everything = np.ones(len(v), bool)
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], e.layers)
        h = norm(layer.vision.norm1, v)
        v = v + attention(layer.vision.self_attn, h, h, everything)
        h = norm(layer.text.norm1, t)
        t = t + attention(layer.text.self_attn, h, h, real if c.text_self_mask else np.ones(len(t), bool))
        v = v + attention(layer.vision.cross_attn, norm(layer.vision.norm2, v), t, real)
        t = t + attention(layer.text.cross_attn, norm(layer.text.norm2, t), v, everything)
        v, t = v + mlp(layer.vision, v), t + mlp(layer.text, t)
    x = attention(slots.attn, slots.queries, norm(e.vision_norm, v), everything)
    return linear(w.mean, x), np.clip(linear(w.logvar, x), -5, 5)


def render(r, c: GeneratorConfig, z, grid):
    """The map [h, w] of latents z [n, Z]."""
    centre, spread = 1 / (1 + np.exp(-linear(r.centre, z))), np.log1p(np.exp(linear(r.spread, z)[:, 0])) + c.min_spread
    weight, h = softmax(linear(r.weight, z)[:, 0]), np.zeros(grid)
    for y, x in np.ndindex(*grid):
        at = np.array([x / max(grid[1] - 1, 1), y / max(grid[0] - 1, 1)])
        h[y, x] = (weight * np.exp(-((at - centre) ** 2).sum(-1) / (2 * spread**2))).sum()
    h = h if c.map_norm == "sum" else np.exp(h / c.temperature)
    return h / h.sum()


def generated(params, c: GeneratorConfig, vision, text, grid, padding=0):
    """The map at inference: the prior's mean, rendered."""
    p = plain(params)
    mean, _ = branch(p.prior, p.prior.slots, c, np.float64(vision), np.float64(text), padding)
    return render(p.renderer, c, mean, grid)


def injected(attention, maps, starts, rows, alpha):
    """Eq. 6-7 on attention [N, T, S] of one sample: maps [P] at `starts`, each of weight α / (number of images)."""
    out = np.array(attention, np.float64)
    for n, t in np.ndindex(out.shape[:2]):
        if rows[t] and len(maps):
            row = (1 - alpha) * out[n, t]
            for m, start in zip(maps, starts, strict=True):
                row[start : start + m.size] += alpha / len(maps) * m.ravel()
            row[t + 1 :] = 0
            out[n, t] = row / row.sum() if row.sum() > 0 else out[n, t]
    return out
